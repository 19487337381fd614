"""Every reward sees copies of its own: what it does to them, no other reward sees."""

import copy
import threading

import numpy as np
import pytest
from PIL import Image

from unidiff.rewards.reward import reward
from unidiff.rewards.table import reward_table
from unidiff.sequence import Modality


def wreck(view):
    """Changes everything that can be reached from a view."""
    for one in (*view.before, view):
        one.tokens.fill_(-1)
        if one.pixels is not None:
            one.image.paste((0, 0, 0), (0, 0, 6, 4))
            one.pixels[:] = 77
            one.edited[:] = True
        one.text, one.index = "gone", 99
    view.image_before.paste((1, 2, 3), (0, 0, 6, 4))
    view.columns["board"]["cells"].clear()
    view.task["cells"].append(5)
    view.prompt[1].paste((5, 5, 5), (0, 0, 6, 4))
    for part in (view.columns, view.prompt):
        part.clear()


def seen(view):
    """Everything that can be seen of a view, as plain data."""
    return (
        view.text,
        view.index,
        view.tokens.tolist(),
        None if view.pixels is None else (view.pixels.tolist(), np.asarray(view.image).tolist(), view.edited.tolist()),
        [np.asarray(part).tolist() if isinstance(part, Image.Image) else part for part in view.prompt],
        np.asarray(view.image_before).tolist(),
        copy.deepcopy((view.task, view.columns)),
        [seen(one) for one in view.before],
    )


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize("on", ["text", "image", "sequence"])
def test_a_reward_may_do_to_its_views_what_it_likes(responses, timeout, on):
    given, untouched = responses(), [[seen(view) for view in row] for row in responses()]

    def vandal(segments, board, **columns):
        for segment, cells in zip(segments, board):
            cells["cells"].append(1)
            for view in [segment] if on != "sequence" else segment.segments:
                wreck(view)
        columns.clear()
        segments.clear()
        return [1.0] * len(board)

    looks = []

    def witness(segments, board, **columns):
        looks.extend((seen(s), b, columns["answer"][i]) for i, (s, b) in enumerate(zip(segments, board)))
        return [1.0] * len(segments)

    table = reward_table([reward(vandal, on=on, timeout=timeout), reward(witness, on="text")], given)
    assert not table.lost, table.messages
    assert looks == [(untouched[b][s], {"cells": [1, 2, 3]}, b) for b in range(3) for s in (0, 2)]
    assert [[seen(view) for view in row] for row in given] == untouched


def test_own_views_are_views(responses):
    rows = responses()

    def looks(segments, **columns):
        for s in segments:
            source = next(row[s.index] for row in rows if row[s.index].text == s.text)
            assert s.modality is Modality.TEXT and s.tokens.dtype == source.tokens.dtype
            assert (s.round, s.last, s.ended) == (source.round, source.last, source.ended)
            assert s.texts_before == source.texts_before and len(s.images_before) == len(source.images_before)
            assert s.before == s.before and all(a is b for a, b in zip(s.before, s.before))
        tasks = {id(s.task) for s in segments}
        assert len(tasks) == 1  # what rows share is copied once
        return [1.0] * len(segments)

    assert not (table := reward_table([reward(looks)], rows)).lost, table.messages


def test_what_cannot_be_copied_is_shared(responses):
    lock = threading.Lock()
    rows = responses()
    for row in rows:
        for view in row:
            view.columns["lock"] = lock
    given = reward(lambda segments, lock: [float(one is rows[0][0].columns["lock"]) for one in lock], name="f")
    assert reward_table([given], rows).values_BSF.nansum() == 6
