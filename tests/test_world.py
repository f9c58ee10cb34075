from __future__ import annotations

import pytest
import torch

from matryoshka_diffusion.config import ConfigError, UsageError
from matryoshka_diffusion.train import distributed as world
from matryoshka_diffusion.train.distributed import rank_device
from matryoshka_diffusion.train.signals import Stopped


def test_errors_that_cannot_be_sent_are_sent_in_words():
    error = ConfigError("train.lr: no such key")
    assert world._portable(error) is error
    sent = world._portable(Stopped("saved", 15))  # takes two arguments to make anew
    assert isinstance(sent, RuntimeError)
    assert str(sent) == "Stopped: saved"


def test_each_rank_takes_its_own_gpu(monkeypatch):
    assert rank_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert rank_device("cpu") == "cpu"
    assert rank_device("cuda") == "cuda:2"  # without a launcher that says which
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert rank_device("cuda") == "cuda:3"
    with pytest.raises(UsageError, match="cuda:1 is one GPU for 8 ranks: give --device cuda"):
        rank_device("cuda:1")
