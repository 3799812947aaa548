"""The contract: every op a backend implements.

Rules that hold for every op:

- Arrays are the backend's own (numpy.ndarray on CPUs), allocated by the caller. A 4-D activation has Caffe's logical
  shape (N,C,H,W) and channels-last memory (N,H,W,C contiguous); a 4-D weight (O,I,kH,kW) likewise lies as O,kH,kW,I.
  Other numbers of axes are C-contiguous. Ops are fast on such arrays and correct on any strides.
- Activation arrays are float32 or bfloat16 (ml_dtypes.bfloat16 in NumPy terms); arithmetic, sums and statistics are
  float32 or wider whatever the storage. Parameters `w`, `b`, `s` may be float32 or the activation type. Parameter
  gradients (`dw`, `db`, `ds`), losses, labels and statistics are float32.
- Outputs are overwritten, never read first, except parameter gradients when `accumulate` is true: then the gradient is
  added. `dx` may be the same array as `dy`, and `y` as `x`, only where an op's text says "in place".
- `positive`, where it is given, is what a ReLU of slope 0 put out: the op's gradient goes on through that ReLU, as relu_backward takes it:
  dx stays where positive > 0, and is 0 dx elsewhere (0, but NaN where dx is not finite). It is read only. `ratio` beside it, unless None: of the
  dropout after that ReLU, which is what put out `positive`: the gradient goes on through both, as dropout_backward takes it for a dx that has been
  stored. No mask is needed for that: what is dropped is 0, and what is kept is above 0 where the ReLU's output is, since 1 / (1-ratio) is 1 or more.
- `stride`, `pad`, `dilation`, `kernel` are tuples with one int per spatial axis.
- An op checks nothing a layer has checked already; it raises DataError for bad values (a label out of range).
- Results are deterministic: the same inputs give the same bits on the same machine and number of threads.
- What changes from one pass or update to the next (its number, the rate) comes in a cell, an array of one float64, never as a plain
  number: a backend may record the ops of an iteration and play them back (see `repeatable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

Array = Any
Ints = tuple[int, ...]


class Segment(NamedTuple):
    """A run of one parameter in the arena: elements start..stop, the multiple of the rate it learns at, its decay (weight_decay*decay_mult)."""

    start: int
    stop: int
    lr_mult: float
    decay: float


class Dials(NamedTuple):
    """What changes from one update to the next, each in a cell. skip: the update does nothing where this is not 0."""

    rate: Array
    grad_scale: Array
    skip: Array


class Peaks(NamedTuple):
    """A device at its best: operations a second in products of matrices (a multiply-add is two) and bytes a second; None: not known. source: who says so."""

    device: str
    operations: float | None
    bandwidth: float | None
    source: str


class Update(NamedTuple):
    """What every update rule is told beside its own settings. l1: decay by the weights' signs. write_step, lowered: see the rules."""

    segments: Sequence[Segment]
    dials: Dials
    l1: bool
    write_step: bool
    lowered: Array | None


class DropoutKey(NamedTuple):
    """Names one dropout mask: see Backend.dropout_forward. iteration: a cell that holds a whole number."""

    seed: int
    layer: int
    iteration: Array


class Drop(NamedTuple):
    """A dropout that an op does with what it gives, as dropout_forward does in place; its mask is kept nowhere."""

    ratio: float
    key: DropoutKey


def strides_of(shape: Ints, itemsize: int) -> Ints:
    """Byte strides of a blob: channels last for 4 axes, C order otherwise."""
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    strides, step = [0] * len(shape), itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def c_order(shape: Ints) -> bool:
    """Whether a blob of this shape lies in memory in C order (a 4-D one lies channels last, see strides_of)."""
    return len(shape) != 4 or shape[1] == 1 or shape[2] * shape[3] == 1


def same_order(shape: Ints, other: Ints) -> bool:
    """Whether blobs of two shapes and one count put each element, counted in C order, at one place in memory.

    Two spatial shapes do where just the last two axes are divided otherwise: both lie as (N, H W, C) in memory.
    """
    return (c_order(shape) and c_order(other)) or (len(shape) == len(other) == 4 and tuple(shape[:2]) == tuple(other[:2]))


def is_usual(x: Array) -> bool:
    """x lies as strides_of says: channels last for 4 axes, C order otherwise."""
    return all(size == 1 or have == want for size, have, want in zip(x.shape, x.strides, strides_of(x.shape, x.itemsize)))


def pitch_of(x: Array) -> int:
    """Elements from one pixel of x (N,C,H,W) to the next where all are as far apart and each one's channels lie together, as those do of channels of a
    larger blob; else 0."""
    if x.ndim != 4:
        return 0
    pixels = (x.shape[2] * x.shape[3], None, x.shape[3], 1)  # from one place along an axis to the next
    steps = [(stride, count) for size, stride, count in zip(x.shape, x.strides, pixels) if count is not None and size > 1]
    step = steps[-1][0] // steps[-1][1] if steps else x.shape[1] * x.itemsize
    even = all(stride == count * step for stride, count in steps) and (x.shape[1] == 1 or x.strides[1] == x.itemsize)
    return int(step // x.itemsize) if even and step % x.itemsize == 0 and step >= x.shape[1] * x.itemsize else 0


def pool_mask_dtype(kernel: Ints) -> str:
    """The dtype of a max-pooling mask: "uint8" when a window has at most 255 cells, else "int32"."""
    return "uint8" if kernel[0] * kernel[1] <= 255 else "int32"


PIECE = 16  # bytes: see Backend.takes_gaps
JOURNAL_HEAD = 2  # elements of a journal before its values: see Backend.append


class Uploads(Protocol):
    """Carries blocks of bytes to the device while ops run there. They arrive in the order in which they were sent."""

    def block(self) -> Array:
        """Host memory for one block: a numpy.ndarray of uint8 from which copies are fast; as many as are asked for."""
        ...

    def send(self, block: Array) -> Callable[[], None]:
        """Starts copying a block. Returns a function that waits until the block has been copied, before which it must not change.
        One block may be sent before `receive` has been called for the one before it, and no further one."""
        ...

    def receive(self) -> Array:
        """The earliest block sent and not yet received, as uint8 on the device; what ops read of it from now on has arrived. To be used
        by the ops up to the next `receive`."""
        ...

    def close(self) -> None:
        """Waits for the copies under way and lets the device's memory go."""
        ...


class Backend(Protocol):
    """All ops, grouped by stem: the first word of a section's head, and the name of the file that holds them in each backend and of their test.

    runs_ahead: ops may return before they have run, so that reading a result waits.
    drops_along: pooling (max_pool_dropout_forward) and products (`drop`) had better do the dropout after them than leave it to a pass of its own.
    takes_gaps: the stems whose ops take activations (N,C,H,W) as they are, without copies, that are channels of larger ones, so that others lie
    between their pixels: where the channels before them, their own, and all are whole pieces of PIECE bytes. A result of `drop` has no gaps.
    """

    name: str
    runs_ahead: bool
    drops_along: bool
    takes_gaps: frozenset[str]
    raw_images: bool  # images had better come as bytes, for `transform` to crop, warp and scale, than as finished floats

    # --- memory ----------------------------------------------------------------------------------------------------

    def supports(self, precision: str) -> str | None:
        """None if `precision` ("float32", "tf32", "bfloat16") runs fast here; else a sentence saying why it is slow.
        Raises BackendError if it cannot run at all."""
        ...

    def allocate(self, nbytes: int) -> Array:
        """A zeroed buffer of bytes aligned to 64."""
        ...

    def view(self, buffer: Array, offset: int, shape: Ints, dtype: str) -> Array:
        """An array of `shape` at byte `offset` of `buffer`, laid out by strides_of."""
        ...

    def empty(self, shape: Ints, dtype: str) -> Array:
        """allocate and view in one."""
        ...

    def to_host(self, x: Array) -> Array:
        """A float32 (or integer) numpy.ndarray in C order with x's values."""
        ...

    def from_host(self, values: Array, x: Array) -> None:
        """Copies a numpy.ndarray of x's shape (any real dtype) into x."""
        ...

    def uploads(self, nbytes: int) -> Uploads:
        """A way to the device for blocks of `nbytes` bytes. BackendError when there is not memory for two of them there."""
        ...

    def fill(self, x: Array, value: float) -> None:
        """x[...] = value."""
        ...

    def assign(self, x: Array, values: Sequence[float]) -> None:
        """x[i] = values[i]: x float64 of one axis and at most 8 elements. Nothing waits."""
        ...

    def copy(self, x: Array, y: Array) -> None:
        """y <- x element by element in logical C order; equal counts, shapes and dtypes may differ (float32 <-> bfloat16)."""
        ...

    def synchronize(self) -> None:
        """Waits until every op so far has finished; nothing on a CPU."""
        ...

    def repeatable(self, run: Callable[[], None]) -> Callable[[], None]:
        """A function to be called instead of `run`, which calls ops alone: each time the same ones on the same arrays, none that returns a
        number or copies to or from the host. A backend may record them and play them back; the record holds the arrays alive, and labels
        out of range give a NaN (as the loss or the accuracy) instead of a DataError."""
        ...

    def mark(self) -> Any:
        """A point among what runs, for seconds_between: all that was asked for so far comes before it."""
        ...

    def seconds_between(self, start: Any, stop: Any) -> float:
        """The time from one mark to another, on the clock of the machine that runs the ops; waits until the later one is reached."""
        ...

    def peaks(self, precision: str) -> Peaks | None:
        """What the machine can do at the most in a precision; None for a CPU."""
        ...

    def peak_bytes(self) -> int | None:
        """The most bytes that arrays have taken on a device of its own so far; None for a backend that computes in the host's memory."""
        ...

    # --- transform: images as records hold them --------------------------------------------------------------------

    def transform(self, planes: Array, places: Array, mean: Array | None, y: Array, warps: Array | None = None, *, scale: float) -> None:
        """y[n,c,h,w] = (image[c, top+h, left+w'] - mean) * scale, w' = W-1-w if mirrored, else w; in float32, rounded to y's type at the end.

        planes (R*C,H',W') uint8: channel c of image r is planes[r*C + c]. places (N,4) int32: for each n the number r of its image, top,
        left, and 1 if mirrored, else 0. mean float32: (C,H',W'), taken where the pixel is taken; (C,1,1); or None for 0. y (N,C,H,W).
        Every step is a float32 operation rounded by itself: all backends give the same bits.

        warps (N,6+C) float32, finite: for each n the numbers oy, ah, aw, ox, bh, bw and add[C], which take the place of top, left and mirrored:

            y[n,c,h,w] = (between(between(d00, d01, fx), between(d10, d11, fx), fy) + add[c]) * scale, between(a, b, f) = a + f (b - a),
            r = (oy + ah h) + aw w and q = (ox + bh h) + bw w, set to 0 where below and to H'-1 and W'-1 where above,
            i = floor(r), fy = r - i, j = floor(q), fx = q - j,
            dkl = image[c, i', j'] - mean[c, i', j'], i' = min(i+k, H'-1), j' = min(j+l, W'-1)."""
        ...

    # --- convolution -----------------------------------------------------------------------------------------------

    def convolution_forward(
        self,
        x: Array,
        w: Array,
        b: Array | None,
        y: Array,
        *,
        stride: Ints,
        pad: Ints,
        dilation: Ints,
        group: int,
        relu: bool = False,
        drop: Drop | None = None,
        tf32: bool = False,
    ) -> None:
        """y[n,o,p] = b[o] + sum_{c in group(o), k} w[o,c,k] x_padded[n, c, p*stride + k*dilation - pad]; relu: max(y,0) after; drop: and then that.

        x (N,C,*in), w (O,C/group,*k), b (O), y (N,O,*out); any number of spatial axes >= 1. spec: layers 3.1.
        tf32, here and in the other products: float32 operands may be rounded to tf32's 10 bits of mantissa, to nearest; sums stay
        float32. Ignored where there is no such fast path.
        """
        ...

    def convolution_backward_data(
        self,
        dy: Array,
        w: Array,
        dx: Array,
        positive: Array | None = None,
        *,
        stride: Ints,
        pad: Ints,
        dilation: Ints,
        group: int,
        ratio: float | None = None,
        tf32: bool = False,
    ) -> None:
        """dx = the transpose of the convolution applied to dy; overwrites dx. positive (dx's shape), ratio: see above."""
        ...

    def convolution_backward_weights(
        self,
        x: Array,
        dy: Array,
        dw: Array | None,
        db: Array | None,
        *,
        stride: Ints,
        pad: Ints,
        dilation: Ints,
        group: int,
        accumulate_w: bool,
        accumulate_b: bool,
        tf32: bool = False,
    ) -> None:
        """dw[o,c,k] (+)= sum_{n,p} dy[n,o,p] x_padded[n,c,p*stride+k*dilation-pad]; db[o] (+)= sum_{n,p} dy[n,o,p]. None: skip."""
        ...

    # --- inner_product ---------------------------------------------------------------------------------------------

    def inner_product_forward(
        self, x: Array, w: Array, b: Array | None, y: Array, *, transpose: bool, relu: bool = False, drop: Drop | None = None, tf32: bool = False
    ) -> None:
        """y = x w^T + b with x (M,K), w (N,K), b (N), y (M,N); transpose: w is (K,N) and y = x w + b. relu: max(y,0) after; drop: and then that."""
        ...

    def inner_product_backward_data(
        self, dy: Array, w: Array, dx: Array, positive: Array | None = None, *, transpose: bool, ratio: float | None = None, tf32: bool = False
    ) -> None:
        """dx = dy w (transpose: dy w^T). positive (dx's shape), ratio: see above."""
        ...

    def inner_product_backward_weights(
        self, x: Array, dy: Array, dw: Array | None, db: Array | None, *, transpose: bool, accumulate_w: bool, accumulate_b: bool, tf32: bool = False
    ) -> None:
        """dw (+)= dy^T x (transpose: x^T dy); db (+)= sum of dy's rows. None: skip."""
        ...

    # --- pooling ---------------------------------------------------------------------------------------------------

    def max_pool_forward(self, x: Array, y: Array, mask: Array | None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        """Per channel plane: y = max over the window that starts at p*stride - pad, clipped to the image.

        The scan is row-major and the first maximum wins; NaN never wins; a window with nothing above -FLT_MAX (an empty one
        too) gives -FLT_MAX (float32 min). mask (y's shape, pool_mask_dtype): kh*kernel_w + kw of the winner in its
        unclipped window; a window without a winner stores the largest value of the dtype (uint8 255) or -1 (int32).
        spec: layers 3.4.
        """
        ...

    def max_pool_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        """dx = 0, then dx[winner] += dy; windows without a winner give nothing. positive (dy's shape, such as forward's y): see above,
        with dy for dx: a winner is above 0 where its window's y is."""
        ...

    def max_pool_indices(self, mask: Array, top: Array, *, kernel: Ints, stride: Ints, pad: Ints, width: int) -> None:
        """top = h*width + w of each winner in the bottom plane, as a float; -1 without a winner."""
        ...

    def ave_pool_forward(self, x: Array, y: Array, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        """y = (sum over the window clipped to the image) / area, the area measured in the padded plane: from p*stride - pad to
        min(that + kernel, size + pad) on each axis, so zero padding counts and what lies beyond does not. An empty window gives NaN."""
        ...

    def ave_pool_backward(self, dy: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        """dx = sum over the windows that hold the cell of dy/area, areas as in ave_pool_forward. positive (dx's shape): see above."""
        ...

    # --- lrn -------------------------------------------------------------------------------------------------------

    def lrn_workspace(self, shape: Ints, dtype: str, *, size: int, alpha: float, beta: float, k: float) -> int:
        """Bytes that lrn_forward leaves for lrn_backward (0 is allowed)."""
        ...

    def lrn_forward(self, x: Array, y: Array, work: Array | None, *, size: int, alpha: float, beta: float, k: float) -> None:
        """Across channels: s_c = k + (alpha/size) sum_{|c'-c| <= (size-1)/2} x_c'^2; y = x s^-beta. x (N,C,H,W).

        work: a uint8 array of lrn_workspace bytes, or None when no backward follows. spec: layers 6.3."""
        ...

    def lrn_backward(
        self, x: Array, y: Array, dy: Array, dx: Array, work: Array, *, size: int, alpha: float, beta: float, k: float, relu: bool = False
    ) -> None:
        """dx_c = dy_c s_c^-beta - (2 alpha beta / size) x_c sum_{c' in window} dy_c' y_c' / s_c'. relu: then as with positive = x."""
        ...

    def lrn_within_workspace(self, shape: Ints, dtype: str, *, size: int, alpha: float, beta: float) -> int:
        """Bytes that lrn_within_forward leaves for lrn_within_backward."""
        ...

    def lrn_within_forward(self, x: Array, y: Array, work: Array | None, *, size: int, alpha: float, beta: float) -> None:
        """Within a channel: y = x (1 + alpha A)^-beta, A = (sum of x^2 over the size x size square around the cell) / size^2."""
        ...

    def lrn_within_backward(self, x: Array, y: Array, dy: Array, dx: Array, work: Array, *, size: int, alpha: float, beta: float, relu: bool = False) -> None:
        """dx = dy s^-beta - (2 alpha beta / size^2) x sum_{cells whose square holds this one} dy y / s, with s = 1 + alpha A. relu: then
        as with positive = x."""
        ...

    # --- lrn_pool: max pooling of what lrn_forward gives, which need not lie anywhere ------------------------------

    def lrn_max_pool_pays(self, shape: Ints, dtype: str, *, size: int, kernel: Ints, stride: Ints) -> bool:
        """Whether these two ops had better be used for an x of this shape and type than lrn_* and max_pool_* one after the other."""
        ...

    def lrn_max_pool_forward(
        self, x: Array, y: Array, mask: Array | None, *, size: int, alpha: float, beta: float, k: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        """y and mask as max_pool_forward gives them for what lrn_forward gives for x, rounded as if it had been stored. x (N,C,H,W)."""
        ...

    def lrn_max_pool_backward(
        self,
        x: Array,
        dy: Array,
        mask: Array,
        dx: Array,
        *,
        size: int,
        alpha: float,
        beta: float,
        k: float,
        kernel: Ints,
        stride: Ints,
        pad: Ints,
        relu: bool = False,
    ) -> None:
        """dx as lrn_backward gives it for what max_pool_backward gives for dy and mask, rounded as if it had been stored. x: forward's;
        what lrn_forward gave is computed again. relu: then as with positive = x."""
        ...

    # --- activations: relu, elu, sigmoid, tanh, power, prelu -------------------------------------------------------

    def relu_forward(self, x: Array, y: Array, *, slope: float) -> None:
        """y = max(x,0) + slope*min(x,0); NaN stays NaN. In place allowed."""
        ...

    def relu_backward(self, y: Array, dy: Array, dx: Array, *, slope: float) -> None:
        """dx = dy where y > 0, else slope*dy (slope >= 0, so y's sign is x's). In place allowed (dx is dy)."""
        ...

    def elu_forward(self, x: Array, y: Array, *, alpha: float) -> None:
        """y = x where x > 0, else alpha (exp(x) - 1). In place allowed."""
        ...

    def elu_backward(self, y: Array, dy: Array, dx: Array, *, alpha: float) -> None:
        """dx = dy where y > 0, else dy (alpha + y), for alpha >= 0. In place allowed (dx is dy)."""
        ...

    def sigmoid_forward(self, x: Array, y: Array) -> None:
        """y = 0.5 tanh(0.5 x) + 0.5. In place allowed."""
        ...

    def sigmoid_backward(self, y: Array, dy: Array, dx: Array) -> None:
        """dx = dy y (1-y). In place allowed (dx is dy)."""
        ...

    def tanh_forward(self, x: Array, y: Array) -> None:
        """y = tanh x. In place allowed."""
        ...

    def tanh_backward(self, y: Array, dy: Array, dx: Array) -> None:
        """dx = dy (1-y^2). In place allowed (dx is dy)."""
        ...

    def power_forward(self, x: Array, y: Array, *, power: float, scale: float, shift: float) -> None:
        """y = (shift + scale x)^power; power*scale = 0 gives the constant 1 (power 0) or shift^power."""
        ...

    def power_backward(self, x: Array, y: Array, dy: Array, dx: Array, *, power: float, scale: float, shift: float) -> None:
        """dx = dy power scale (shift + scale x)^(power-1), in the steps of spec: layers 5 (Power), NaN at a zero base included."""
        ...

    def prelu_forward(self, x: Array, a: Array, y: Array) -> None:
        """y = max(x,0) + a_c min(x,0); a is (C) for axis 1 of x, or has no axes (one slope for all). In place allowed."""
        ...

    def prelu_backward_data(self, x: Array, a: Array, dy: Array, dx: Array) -> None:
        """dx = dy where x > 0, else a_c dy. In place allowed (dx is dy)."""
        ...

    def prelu_backward_slope(self, x: Array, dy: Array, da: Array, *, accumulate: bool) -> None:
        """da_c (+)= sum of dy x over the cells with x <= 0."""
        ...

    # --- dropout ---------------------------------------------------------------------------------------------------

    def dropout_forward(self, x: Array, y: Array, mask: Array, *, ratio: float, key: DropoutKey) -> None:
        """y = x m / (1-ratio); mask (uint8, x's shape and layout) = m in {0,1}. In place allowed.

        m is drawn from Philox 4x64-10 exactly as numpy.random.Philox(key=[seed, layer], counter=[0, 0, iteration, 0])
        yields 64-bit words through random_raw; each word gives four 16-bit values, lowest bits first; value j belongs to the
        j-th element in memory order (channels last); m = 1 iff value >= round(ratio * 65536).
        """
        ...

    def dropout_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float) -> None:
        """dx = dy m / (1-ratio). positive (dx's shape): see above. In place allowed (dx is dy)."""
        ...

    # --- pool_dropout: dropout of what pooling gives ---------------------------------------------------------------

    def max_pool_dropout_forward(self, x: Array, y: Array, mask: Array | None, *, ratio: float, key: DropoutKey, kernel: Ints, stride: Ints, pad: Ints) -> None:
        """y as dropout_forward gives it in place on max_pool_forward's y; mask as the latter's, but that an output which is dropped has no winner."""
        ...

    def max_pool_dropout_backward(
        self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        """dx as max_pool_backward gives it for dy / (1-ratio), rounded as if it had been stored. An output that was dropped gives nothing,
        whatever its dy. positive (dy's shape, such as forward's y): as there."""
        ...

    def ave_pool_dropout_forward(self, x: Array, y: Array, mask: Array | None, *, ratio: float, key: DropoutKey, kernel: Ints, stride: Ints, pad: Ints) -> None:
        """y and mask (uint8, y's shape; None: not asked for) as dropout_forward gives them in place on ave_pool_forward's y."""
        ...

    def ave_pool_dropout_backward(
        self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        """dx as ave_pool_backward gives it for what dropout_backward gives for dy and mask, rounded as if it had been stored."""
        ...

    # --- batch_norm ------------------------------------------------------------------------------------------------

    def batch_norm_statistics(self, x: Array, mean: Array, variance: Array) -> None:
        """Per channel (axis 1) over all other axes: mean (C) and biased variance (C)."""
        ...

    def batch_norm_accumulate(
        self,
        mean: Array,
        variance: Array,
        mean_sum: Array,
        variance_sum: Array,
        weight: Array,
        skip: Array | None = None,
        *,
        fraction: float,
        correction: float,
    ) -> None:
        """mean_sum <- fraction mean_sum + mean; variance_sum <- fraction variance_sum + correction variance; weight <- fraction weight + 1.
        All (C) but weight (1), float32; products and sums are rounded one by one. skip: a cell; nothing happens where it is not 0."""
        ...

    def batch_norm_global_statistics(self, mean_sum: Array, variance_sum: Array, weight: Array, mean: Array, variance: Array) -> None:
        """mean = mean_sum / weight and variance = variance_sum / weight by way of 1 / weight in float32; 0 and 0 while weight is 0."""
        ...

    def batch_norm_forward(self, x: Array, mean: Array, variance: Array, y: Array, *, eps: float) -> None:
        """y = (x - mean_c) / sqrt(variance_c + eps). In place allowed."""
        ...

    def batch_norm_backward(self, y: Array, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        """dx = (dy - mean(dy) - y mean(dy y)) / sqrt(variance_c + eps), means per channel; y is the normalised output.
        In place allowed (dx is dy)."""
        ...

    def batch_norm_backward_global(self, variance: Array, dy: Array, dx: Array, *, eps: float) -> None:
        """dx = dy / sqrt(variance_c + eps). In place allowed (dx is dy)."""
        ...

    # BatchNorm with the Scale (and ReLU) that follow, x (N,C) or (N,C,H,W); mean, variance, s, b, ds, db (C), float32.

    def batch_norm_scale_forward(self, x: Array, mean: Array, variance: Array, s: Array, b: Array, y: Array, *, eps: float, relu: bool) -> None:
        """y = s_c h + b_c with h = (x - mean_c) / sqrt(variance_c + eps); relu: max(y,0) after, NaN stays NaN. In place allowed."""
        ...

    def batch_norm_scale_backward(
        self,
        x: Array,
        y: Array,
        mean: Array,
        variance: Array,
        s: Array,
        b: Array,
        dy: Array,
        dx: Array,
        ds: Array | None,
        db: Array | None,
        *,
        eps: float,
        relu: bool,
        fixed: bool,
        accumulate_s: bool,
        accumulate_b: bool,
    ) -> None:
        """ds (+)= sum g h, db (+)= sum g (None: left out); dx = s_c / sqrt(variance_c + eps) (g - mean(g) - h mean(g h)), means per channel.
        g = dy; relu: dy where y > 0, else 0 dy, y being forward's, or computed again in forward's steps. fixed: mean and variance are
        no functions of x, and dx = s_c / sqrt(variance_c + eps) g. In place allowed (dx is dy)."""
        ...

    # --- scale_bias ------------------------------------------------------------------------------------------------

    def scale_forward(self, x: Array, s: Array, b: Array | None, y: Array) -> None:
        """y = x s (+ b). s and b have x's number of axes, each axis x's size or 1, and broadcast. In place allowed."""
        ...

    def scale_backward_data(self, dy: Array, s: Array, dx: Array) -> None:
        """dx = dy s. In place allowed (dx is dy)."""
        ...

    def scale_backward_factor(self, x: Array, dy: Array, ds: Array, *, accumulate: bool) -> None:
        """ds (+)= dy x summed over the axes where ds has size 1 and x has not."""
        ...

    def bias_forward(self, x: Array, b: Array, y: Array) -> None:
        """y = x + b, b broadcast as in scale_forward. In place allowed."""
        ...

    def bias_backward(self, dy: Array, db: Array, *, accumulate: bool) -> None:
        """db (+)= dy summed over the axes where db has size 1 and dy has not."""
        ...

    # --- eltwise: also Split's sum ---------------------------------------------------------------------------------

    def eltwise_sum(self, xs: Sequence[Array], y: Array, coeffs: Sequence[float], positive: Array | None = None, *, relu: bool = False) -> None:
        """y = sum_i coeffs[i] xs[i], added in order; relu: max(y,0) after, NaN stays NaN. y may be xs[0]. positive (y's shape): see above,
        with y for dx."""
        ...

    def eltwise_product_forward(self, xs: Sequence[Array], y: Array) -> None:
        """y = product of xs."""
        ...

    def eltwise_product_backward(self, xs: Sequence[Array], y: Array, dy: Array, dx: Array, *, index: int, stable: bool) -> None:
        """dx of xs[index]: the product of the others times dy (stable), or y/xs[index]*dy."""
        ...

    def eltwise_max_forward(self, xs: Sequence[Array], y: Array, winner: Array) -> None:
        """y = max of xs; winner (uint8, y's shape): 0 only if xs[0] > xs[1], else 1; each later i only if strictly greater."""
        ...

    def eltwise_max_backward(self, winner: Array, dy: Array, dx: Array, *, index: int) -> None:
        """dx = dy where winner == index, else 0."""
        ...

    # --- losses: softmax, losses, accuracy -------------------------------------------------------------------------

    def softmax_forward(self, x: Array, y: Array, *, axis: int) -> None:
        """y = exp(x - max) / sum along axis. In place allowed."""
        ...

    def softmax_backward(self, y: Array, dy: Array, dx: Array, *, axis: int) -> None:
        """dx = y (dy - sum along axis of dy y). In place allowed (dx is dy)."""
        ...

    def softmax_loss_forward(
        self, x: Array, label: Array, prob: Array, loss: Array, normalizer: Array, *, axis: int, ignore_label: int | None, normalization: str
    ) -> None:
        """prob = softmax(x) along axis (float32, x's shape); loss (no axes) = -sum ln(max(prob[label], FLT_MIN)) / Z.

        label: float32 class numbers (truncated to int), count = x.count / x.shape[axis], in the order of x's other axes.
        normalizer (no axes) = Z = max(1, count by normalization): FULL outer*inner, VALID positions not ignored, BATCH_SIZE outer,
        NONE 1; outer and inner are the counts before and after axis. DataError for a label outside 0..classes-1 that is
        not ignored. spec: layers 9.0, 9.1."""
        ...

    def softmax_loss_backward(self, prob: Array, label: Array, dloss: Array, normalizer: Array, dx: Array, *, axis: int, ignore_label: int | None) -> None:
        """dx = (prob - onehot(label)) dloss / normalizer, all 0 at ignored positions. dloss has no axes."""
        ...

    def euclidean_loss_forward(self, a: Array, b: Array, loss: Array) -> None:
        """loss = sum (a-b)^2 / (2 N), N = a.shape[0]."""
        ...

    def euclidean_loss_backward(self, a: Array, b: Array, dloss: Array, dx: Array, *, sign: int) -> None:
        """dx = sign * dloss (a-b) / N; sign +1 for a, -1 for b."""
        ...

    def accuracy(self, x: Array, label: Array, accuracy: Array, per_class: Array | None, *, top_k: int, axis: int, ignore_label: int | None) -> None:
        """accuracy (no axes) = correct / positions not ignored (0 if none). Correct: fewer than top_k other classes score >= the
        true one (ties count against it; a NaN true score is correct). per_class (classes): correct/total, 0 for absent classes.
        DataError for a label out of range. spec: layers 9.8."""
        ...

    # --- updates: reductions and update rules over the parameter arena ---------------------------------------------

    def sum_squares(self, x: Array) -> float:
        """Sum of squares, accumulated in float64."""
        ...

    def sum_absolute(self, x: Array) -> float:
        """Sum of absolute values, accumulated in float64."""
        ...

    def all_finite(self, x: Array) -> bool:
        """No NaN and no infinity in x."""
        ...

    def scale_in_place(self, x: Array, factor: float) -> None:
        """x *= factor."""
        ...

    def add_sum(self, x: Array, total: Array, *, factor: float, accumulate: bool) -> None:
        """total (+)= factor * sum of x, in float64; total is a cell."""
        ...

    def append(self, journal: Array, value: Array, *, divisor: float) -> None:
        """Adds value/divisor (a cell) to a journal, a float64 array of one axis: element 0 counts its values, which begin at JOURNAL_HEAD;
        element 1 becomes 1 with the first value that is not finite. A full journal takes no more values."""
        ...

    def clip_gradients(self, g: Array, norm: Array, grad_scale: Array, *, limit: float, divisor: float) -> None:
        """norm = sqrt(sum of g^2) in float64; grad_scale = (limit/norm where norm > limit, else 1) / divisor. Both are cells."""
        ...

    # Every update works on flat float32 arrays of one length: w values, g gradients, h (and v) states. For each segment:
    # rate = dials.rate*lr_mult; g' = g*grad_scale + decay*w (l1: decay*sign(w)); the step D below; w -= D. write_step: g <- D, else g is
    # left undefined. lowered (bfloat16) <- w. D is evaluated in float32 in Caffe's order.

    def sgd_update(self, w: Array, g: Array, h: Array, how: Update, *, momentum: float) -> None:
        """h <- momentum h + rate g'; D = h."""
        ...

    def nesterov_update(self, w: Array, g: Array, h: Array, how: Update, *, momentum: float) -> None:
        """h' = momentum h + rate g'; D = (1+momentum) h' - momentum h; h <- h'."""
        ...

    def adagrad_update(self, w: Array, g: Array, h: Array, how: Update, *, delta: float) -> None:
        """h <- h + g'^2; D = rate g' / (sqrt(h) + delta)."""
        ...

    def rmsprop_update(self, w: Array, g: Array, h: Array, how: Update, *, rms_decay: float, delta: float) -> None:
        """h <- rms_decay h + (1-rms_decay) g'^2; D = rate g' / (sqrt(h) + delta)."""
        ...

    def adadelta_update(self, w: Array, g: Array, h: Array, v: Array, how: Update, *, momentum: float, delta: float) -> None:
        """h <- m h + (1-m) g'^2; d = g' sqrt((v+delta)/(h+delta)); v <- m v + (1-m) d^2; D = rate d."""
        ...

    def adam_update(self, w: Array, g: Array, h: Array, v: Array, how: Update, *, momentum: float, momentum2: float, delta: float) -> None:
        """h <- b1 h + (1-b1) g'; v <- b2 v + (1-b2) g'^2; D = rate h / (sqrt(v) + delta). The rate holds the correction of the first steps."""
        ...
