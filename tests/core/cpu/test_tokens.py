"""Rows laid end to end: what is left out, what is computed once, where everything stands."""

import torch

from qlora.cpu.tokens import MULTIPLE, flatten, whole_rows


def test_two_rows_by_hand():
    ids = torch.tensor([[1, 2, 3, 4, 5, 0], [1, 2, 6, 7, 0, 0]])
    wanted = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    rows = flatten(ids, wanted)
    # 5 and 7 come after the last wanted position; 1, 2 begin both rows and stand once
    assert rows.ids[:5].tolist() == [1, 2, 3, 4, 6] and len(rows.ids) == MULTIPLE
    assert rows.bands[0].place.tolist() == [[0, 1, 2, 3], [0, 1, 4, -1]]
    assert rows.bands[0].owner.tolist() == [0, 1, 2, 3, 4 + 2] + [-1] * (MULTIPLE - 5)
    assert (rows.bands[0].shared, rows.wanted.tolist()) == (2, [3, 4])


def test_rows_that_are_alike_keep_a_token_of_their_own():
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    wanted = torch.tensor([[False, False, True]] * 2)
    rows = flatten(ids, wanted)
    assert rows.bands[0].shared == 2 and rows.wanted.tolist() == [2, 3]


def test_a_row_alone_shares_with_nobody():
    rows = flatten(torch.tensor([[4, 5, 6]]), torch.tensor([[True, False, True]]))
    assert rows.bands[0].shared == 0 and rows.wanted.tolist() == [0, 2] and rows.ids[:3].tolist() == [4, 5, 6]


def test_a_row_without_a_wanted_position_takes_part_with_one_token():
    wanted = torch.tensor([[False, False], [False, True]])
    rows = flatten(torch.tensor([[8, 9], [5, 6]]), wanted)
    assert rows.bands[0].place.tolist() == [[0, -1], [1, 2]] and rows.wanted.tolist() == [2]


def test_whole_rows_are_flat_rows_that_share_nothing():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    wanted = torch.zeros(2, 3, dtype=torch.bool)
    wanted[:, -1] = True
    found, made = whole_rows(ids, 3), flatten(ids, wanted)
    assert torch.equal(found.ids, made.ids) and torch.equal(found.bands[0].place, made.bands[0].place)
    assert torch.equal(found.bands[0].owner, made.bands[0].owner) and found.wanted.tolist() == list(range(6))
