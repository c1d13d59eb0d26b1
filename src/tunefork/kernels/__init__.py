"""Operations with a hand-written backward, each beside its plain PyTorch definition."""
