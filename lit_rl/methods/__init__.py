"""One method a file; each is settings and, where its loss differs, a few lines."""

__all__ = [
    "CISPO",
    "DAPO",
    "GRPO",
    "GSPO",
    "NFT",
    "RFT",
    "RLCCF",
    "RLOO",
    "SFT",
    "DrGRPO",
    "Pretrain",
    "ReinforcePP",
    "ReinforcePPBaseline",
]
