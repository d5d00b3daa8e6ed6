def choose(
    logits: int,
    tokens: int,
    temperature: int,
    top_k: int,
    top_p: int,
    seed: int,
    position: int,
    out: int,
    rows: int,
    vocab: int,
) -> None: ...
