def add_norm(
    eps: float,
    x: int,
    product: int,
    product_scale: int,
    bias: int,
    weight: int,
    out: int,
    out_scale: int,
    rows: int,
    hidden: int,
) -> None: ...
def scale(x: int, factor: int, out: int, out_scale: int, rows: int, inner: int) -> None: ...
def gated(product: int, product_scale: int, bias: int, out: int, out_scale: int, rows: int, inner: int) -> None: ...
def attend(
    eps: float,
    qkv: int,
    qkv_scale: int,
    bias: int,
    q_norm: int,
    k_norm: int,
    cos: int,
    sin: int,
    queries: int,
    keys: int,
    values: int,
    first_slot: int,
    counts: int,
    prefix: int,
    path: int,
    depth: int,
    weights: int,
    out: int,
    out_scale: int,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    length: int,
) -> None: ...
def join(
    eps: float,
    embedded: int,
    features: int,
    embed_weight: int,
    feature_weight: int,
    out: int,
    out_scale: int,
    rows: int,
    hidden: int,
) -> None: ...
def score(bias: float, state: int, logits: int, weight: int, out: int, rows: int, hidden: int, vocab: int) -> None: ...
def use_threads(fork: int, thread_number: int, num_threads: int, threads: int) -> None: ...
