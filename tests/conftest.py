import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy box are ten times slower than one
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import logging
import sys
from pathlib import Path

import pytest

logging.raiseExceptions = False  # handlers that outlive a captured stream


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """No test writes into the checkout, and one test's global seed, ranks and modules are not another's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():  # such as LOCAL_RANK, with which a command starts no further ranks
        if not name.startswith("WANDB_"):  # its process is the same for all tests
            del os.environ[name]
    here = {n for n, m in sys.modules.items() if Path(getattr(m, "__file__", None) or "/").is_relative_to(tmp_path)}
    for name in here:  # another test may have a module of the same name
        del sys.modules[name]
    if here and (base := sys.modules.get("lit_rl.datamodules.families.base")):
        for name, family in list(base.REGISTRY.items()):
            if type(family).__module__ in here:
                del base.REGISTRY[name]
    import torch.distributed as dist

    if dist.is_initialized():  # what is forked by a later test would wait for others in it
        dist.destroy_process_group()
