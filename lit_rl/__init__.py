"""Reinforcement learning for LLM reasoning as ordinary PyTorch Lightning parts.

`import lit_rl` costs nothing: each public name is imported when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "callbacks").is_dir():  # a checkout: callbacks/, datamodules/ and kernels/ stand beside lit_rl/
    __path__.append(str(_here.parent))

_PUBLIC = {
    "Task": "task",
    "Verdict": "task",
    "Experience": "experience",
    "Actor": "actor",
    "LoRA": "adapters",
    "Policy": "policy",
    "Rollout": "rollout",
    "RLCallback": "hooks",
    "Sampling": "generation.base",
    "Completion": "generation.base",
    "Generator": "generation.base",
    "VLLM": "generation.vllm",
    "VLLMServer": "generation.vllm_server",
    "SFT": "methods.sft",
    "Pretrain": "methods.pretrain",
    "MuP": "mup",
    "GRPO": "methods.grpo",
    "DrGRPO": "methods.dr_grpo",
    "DAPO": "methods.dapo",
    "RLOO": "methods.rloo",
    "ReinforcePP": "methods.reinforce_pp",
    "ReinforcePPBaseline": "methods.reinforce_pp",
    "GSPO": "methods.gspo",
    "CISPO": "methods.cispo",
    "NFT": "methods.nft",
    "RFT": "methods.nft",
    "RLCCF": "methods.rlccf",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"lit_rl.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lit_rl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
