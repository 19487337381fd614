"""Model families: conversion of published checkpoints to `UnifiedModel` and back. See docs/families.md."""

from unidiff.families import dimoo, llada, mmada, mmada_parallel, native
from unidiff.families.registry import (
    FAMILIES,
    Family,
    find,
    folder_of,
    load_backbone,
    own_settings,
    read_config,
    register,
)

__all__ = [
    "FAMILIES",
    "Family",
    "dimoo",
    "find",
    "folder_of",
    "llada",
    "load_backbone",
    "mmada",
    "mmada_parallel",
    "native",
    "own_settings",
    "read_config",
    "register",
]
