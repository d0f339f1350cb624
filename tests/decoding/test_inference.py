import pytest
from torch import nn

from sparsegate.decoding.inference import evaluation_mode


def test_every_module_is_afterwards_in_the_mode_it_was_in():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Dropout())).train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before


def test_the_mode_is_restored_after_an_error():
    model = nn.Dropout()
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert model.training
