import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegate.decoding.likelihood import groups_by_length, row_batches

rows_of_tokens = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=5)


@given(rows=rows_of_tokens, num_steps=st.integers(1, 15))
def test_batches_hold_each_token_once_after_the_token_before_it(rows, num_steps):
    first_inputs = [100 + index for index in range(len(rows))]
    arrays = [np.array(row) for row in rows]
    batches = list(row_batches(arrays, first_inputs=first_inputs, num_steps=num_steps))
    assert [batch.carries_state for batch in batches] == [index > 0 for index in range(len(batches))]
    assert all(batch.input_BS.shape[1] <= num_steps for batch in batches)
    for index, row in enumerate(rows):
        mask = torch.cat([batch.mask_BS[index] for batch in batches])
        assert torch.cat([batch.target_BS[index] for batch in batches])[mask].tolist() == row
        assert torch.cat([batch.input_BS[index] for batch in batches])[mask].tolist() == [
            first_inputs[index],
            *row[:-1],
        ]


@given(lengths=st.lists(st.integers(1, 30)), max_tokens=st.integers(1, 60))
def test_groups_hold_every_row_once_and_at_most_so_many_positions(lengths, max_tokens):
    groups = list(groups_by_length(lengths, max_tokens=max_tokens))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= max_tokens
