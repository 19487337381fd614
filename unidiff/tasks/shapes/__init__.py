"""Coloured shapes on a plain ground: pictures from prompts, and edits of pictures."""
