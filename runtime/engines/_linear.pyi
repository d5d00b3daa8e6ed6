kernels: object

def quantize(x: int, values: int, scale: int, offset: int, sum: int, rows: int, length: int, blocks: int) -> None: ...
def product(
    linear: int,
    values: int,
    scale: int,
    offset: int,
    sum: int,
    rows: int,
    out: int,
    stride: int,
    first_tile: int,
    last_tile: int,
) -> None: ...
def processors() -> list[str]: ...
def use(processor: str) -> None: ...
def pack(
    weights: int, outputs: int, inputs: int, scale: int, least: int, scale_half: int, least_half: int, packed: int
) -> None: ...
