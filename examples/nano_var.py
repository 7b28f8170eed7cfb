"""VAR in one file: an image is generated coarse to fine, one whole token map at a time.

    python examples/nano_var.py    # five minutes on two CPU cores; pictures in runs/nano_var

Equations, algorithms and sections are those of the paper: Tian et al. 2024, arXiv 2404.02905.

Stage 1 trains a tokenizer. An encoder turns an image of 8x8 pixels into a map f of 4x4 features.
The quantizer writes f as a sum of four token maps of 1x1, 2x2, 3x3 and 4x4 tokens. Each map encodes
the residual that the coarser maps leave. A decoder turns the sum back into an image.

Stage 2 trains a transformer on the sequence of all maps, 1 + 4 + 9 + 16 = 30 tokens. It predicts
all tokens of a map at once, from the coarser maps. So sampling takes 4 forward passes, not 30:

    p(r_1, ..., r_K) = product over k of p(r_k | r_1, ..., r_{k-1})    (Eq. 6)

Left out here, and part of varjax: LPIPS and GAN losses, key-value cache, top-k, top-p, editing.

An array's name ends in its shape, one letter per axis: B images, N items of data, H W pixels, h w
features, K scales, L tokens of an image, l tokens of some scales, V codes, Z channels of a code,
C width of the transformer, A attention heads, D channels of a head. A digit is that length.
"""

import functools
import math
import pathlib
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

SCALES = (1, 2, 3, 4)  # sides of the token maps; for 256 pixels 1, 2, 3, 4, 5, 6, 8, 10, 13, 16
K, SIDE = len(SCALES), SCALES[-1]
ENDS = [0, *np.cumsum(np.square(SCALES)).tolist()]  # scale k is tokens ENDS[k] to ENDS[k + 1]
L = ENDS[-1]
V, Z = 256, 16
C, A, DEPTH = 128, 4, 4
CLASSES = 10  # digits; label 10 means "no class"
FOLDER = pathlib.Path("runs/nano_var")
# The only mask of the method: a token sees its own scale and all coarser ones (section 3.2).
LEVEL_L = np.repeat(np.arange(K), np.square(SCALES))
MASK_LL = LEVEL_L[:, None] >= LEVEL_L[None]


def digits():
    """Returns training data and held-out data: images (N, 8, 8, 1) in [-1, 1] and labels (N,)."""
    image_NC, label_N = load_digits(return_X_y=True)
    image_NHW = np.asarray(image_NC, np.float32).reshape(-1, 8, 8)
    held_out_N, rng = np.arange(len(label_N)) % 5 == 4, np.random.default_rng(0)
    # Ten altered copies of each image: a transformer would soon memorize 1,438 images.
    train_NHW, train_N = np.tile(image_NHW[~held_out_N], (10, 1, 1)), label_N[~held_out_N]
    train_NHW = np.stack([augment(image_HW, rng) for image_HW in train_NHW])
    train = {"image": train_NHW[..., None] / 8 - 1, "label": np.tile(train_N, 10)}
    held_out = {"image": image_NHW[held_out_N, :, :, None] / 8 - 1, "label": label_N[held_out_N]}
    return train, held_out


def augment(image_HW, rng):
    """Rotates by up to 6 degrees, scales by up to 6 % and shifts by up to 0.3 pixels."""
    turn, zoom, x, y = rng.uniform(-1, 1, 4) * (np.radians(6), 0.06, 0.3, 0.3)
    a, b = (1 + zoom) * np.cos(turn), (1 + zoom) * np.sin(turn)
    # Two rows of the affine map from output pixels to input pixels; the center stays at (4, 4).
    affine = a, b, 4 * (1 - a - b) + x, -b, a, 4 * (1 - a + b) + y
    how = Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    return np.clip(np.array(Image.fromarray(image_HW).transform((8, 8), *how)), 0, 16)


# Stage 1: the multi-scale tokenizer (section 3.2, algorithms 1 and 2).
def area_matrix(size, out):
    """Averages `size` values down to `out`: the matrix (out, size) of adaptive average pooling."""
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def cubic_matrix(size, out, a=-0.75):
    """Interpolates `size` values up to `out` by Keys' cubic kernel, repeating the edges."""
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        position = (i + 0.5) * size / out - 0.5
        for j in range(math.floor(position) - 1, math.floor(position) + 3):
            t = abs(position - j)
            near = ((a + 2) * t - (a + 3)) * t * t + 1
            far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
            matrix[i, np.clip(j, 0, size - 1)] += near if t <= 1 else far
    return matrix


def resize(x_BhwZ, matrix):
    """Resizes both sides of a square map by the same matrix."""
    return jnp.einsum("Hh,Ww,BhwZ->BHWZ", matrix, matrix, x_BhwZ)


def downsample(f_BhwZ, side):
    """Averages a map down to (side, side) and flattens it: (B, l, Z)."""
    return resize(f_BhwZ, area_matrix(SIDE, side)).reshape(-1, side * side, Z)


class ResidualBlock(nn.Module):
    """Adds two convolutions to its input."""

    @nn.compact
    def __call__(self, x_BhwC):
        y_BhwC = x_BhwC
        for _ in range(2):
            y_BhwC = nn.Conv(x_BhwC.shape[-1], (3, 3))(nn.silu(nn.GroupNorm(8)(y_BhwC)))
        return x_BhwC + y_BhwC


class Tokenizer(nn.Module):
    """Maps an image to K token maps and back; images are (B, 8, 8, 1) in [-1, 1]."""

    def setup(self):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3))
        halve, double = conv(64, strides=2), lambda x: jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        encoder = conv(32), ResidualBlock(), halve, ResidualBlock(), conv(Z)
        decoder = conv(64), ResidualBlock(), double, conv(32), ResidualBlock(), conv(1)
        self.encode, self.decode = nn.Sequential(encoder), nn.Sequential(decoder)
        # All scales share one codebook; each has its own convolution phi_k.
        self.codebook_VZ = self.param("codebook", nn.initializers.normal(1 / V), (V, Z))
        self.phi = [conv(Z) for _ in SCALES]

    def __call__(self, image_BHW1):
        """Returns decoded images, features f, tokens (B, L), and the K partial sums f_hat."""
        f_BhwZ = self.encode(image_BHW1)
        token_BL, f_hats = self.quantize(f_BhwZ)
        # Straight-through: the decoder reads f_hat, its gradient goes to f.
        straight_BhwZ = f_BhwZ + jax.lax.stop_gradient(f_hats[-1] - f_BhwZ)
        return self.decode(straight_BhwZ), f_BhwZ, token_BL, f_hats

    def quantize(self, f_BhwZ):
        """Chooses the codes of each scale (algorithm 1): they encode what coarser scales leave."""
        tokens, f_hats, f_hat_BhwZ = [], [], jnp.zeros_like(f_BhwZ)
        for k, side in enumerate(SCALES):
            residual_BlZ = downsample(f_BhwZ - f_hat_BhwZ, side)
            # The nearest code (Eq. 3). |r - e|^2 = |r|^2 - 2 r e + |e|^2; |r|^2 does not matter.
            dot_BlV = jnp.einsum("BlZ,VZ->BlV", residual_BlZ, self.codebook_VZ)
            length_V = jnp.sum(jnp.square(self.codebook_VZ), axis=1)
            tokens.append(jnp.argmin(length_V[None, None] - 2 * dot_BlV, axis=2))
            f_hat_BhwZ = self.add_scale(f_hat_BhwZ, tokens[-1], k)
            f_hats.append(f_hat_BhwZ)
        return jnp.concatenate(tokens, axis=1), f_hats

    def add_scale(self, f_hat_BhwZ, token_Bl, k):
        """Adds scale k to the sum of the coarser scales (algorithm 2)."""
        code_BhwZ = self.codebook_VZ[token_Bl].reshape(-1, SCALES[k], SCALES[k], Z)
        code_BhwZ = resize(code_BhwZ, cubic_matrix(SCALES[k], SIDE))
        # Upsampling blurs; phi_k repairs it. Half of it is the identity, as in the official code.
        return f_hat_BhwZ + 0.5 * self.phi[k](code_BhwZ) + 0.5 * code_BhwZ


def tokenizer_loss(params, batch, key):
    """Computes reconstruction, codebook and commitment loss (Eq. 5, without LPIPS and GAN)."""
    stop = jax.lax.stop_gradient
    decoded_BHW1, f_BhwZ, _, f_hats = Tokenizer().bind({"params": params})(batch["image"])
    error_BHW1 = decoded_BHW1 - batch["image"]
    loss = jnp.mean(jnp.square(error_BHW1)) + 0.2 * jnp.mean(jnp.abs(error_BHW1))
    for f_hat_BhwZ in f_hats:  # codes approach features; features approach codes, more slowly
        loss += jnp.mean(jnp.square(f_hat_BhwZ - stop(f_BhwZ))) / K
        loss += 0.25 * jnp.mean(jnp.square(stop(f_hat_BhwZ) - f_BhwZ)) / K
    return loss


def teacher_forcing(params, image_BHW1):
    """Returns targets (B, 30) and inputs (B, 29, Z): sums of coarser scales at a scale's size."""
    _, _, token_BL, f_hats = Tokenizer().bind({"params": params})(image_BHW1)
    inputs = [downsample(f_hat, side) for f_hat, side in zip(f_hats, SCALES[1:], strict=False)]
    return token_BL, jnp.concatenate(inputs, axis=1)


# Stage 2: the transformer (section 3.3). The class enters every block by AdaLN, as in DiT.
def modulate(x_BlC, scale_B1C, shift_B1C):
    """Applies LayerNorm, with a scale and shift that the class decides."""
    norm = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False)
    return norm(x_BlC) * (1 + scale_B1C) + shift_B1C


class Attention(nn.Module):
    """Computes attention with unit queries and keys, and one learned temperature per head."""

    @nn.compact
    def __call__(self, x_BlC):
        B, length, _ = x_BlC.shape
        qkv_BlE = nn.Dense(3 * C, use_bias=False, name="qkv")(x_BlC)
        q_BlAD, k_BlAD, v_BlAD = jnp.moveaxis(qkv_BlE.reshape(B, length, 3, A, C // A), 2, 0)
        q_BlAD, k_BlAD = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q_BlAD, k_BlAD))
        log_scale_A = self.param("log_scale", nn.initializers.constant(math.log(4)), (A,))
        logits_BAll = jnp.einsum("BlAD,BmAD,A->BAlm", q_BlAD, k_BlAD, jnp.exp(log_scale_A))
        mask_ll = MASK_LL[:length, :length]
        weight_BAll = nn.softmax(jnp.where(mask_ll[None, None], logits_BAll, -jnp.inf))
        y_BlC = jnp.einsum("BAlm,BmAD->BlAD", weight_BAll, v_BlAD).reshape(B, length, C)
        return nn.Dense(C, name="proj")(y_BlC)


class Block(nn.Module):
    """Adds attention and an MLP. The class decides scale and shift before, and gate after each."""

    @nn.compact
    def __call__(self, x_BlC, class_BC):
        adaln = nn.Dense(6 * C, kernel_init=nn.initializers.zeros, name="adaln")
        six = jnp.split(adaln(nn.silu(class_BC)).reshape(-1, 6, C), 6, axis=1)  # each (B, 1, C)
        gate1, gate2, scale1, scale2, shift1, shift2 = six  # the gates are 0 before training
        x_BlC = x_BlC + gate1 * Attention(name="attn")(modulate(x_BlC, scale1, shift1))
        h_Bl4C = nn.gelu(nn.Dense(4 * C, name="up")(modulate(x_BlC, scale2, shift2)))
        return x_BlC + gate2 * nn.Dense(C, name="down")(h_Bl4C)


class VAR(nn.Module):
    """Predicts the logits of all tokens in any number of scales, from the coarsest on."""

    @nn.compact
    def __call__(self, input_BlZ, label_B):
        """Returns logits (B, 1 + l, V); scale 0 has no input but the class, its start token."""
        normal = nn.initializers.normal(0.02)
        class_BC = nn.Embed(CLASSES + 1, C, name="class_embed")(label_B)
        x_BlC = nn.Dense(C, name="token_embed")(input_BlZ)
        x_BlC = jnp.concatenate([class_BC[:, None], x_BlC], axis=1)
        pos_LC = self.param("pos_embed", normal, (L, C))
        level_KC = self.param("level_embed", normal, (K, C))
        x_BlC = x_BlC + (pos_LC + level_KC[LEVEL_L])[None, : x_BlC.shape[1]]
        for i in range(DEPTH):
            x_BlC = Block(name=f"block_{i}")(x_BlC, class_BC)
        adaln_B2C = nn.Dense(2 * C, name="head_adaln")(nn.silu(class_BC)).reshape(-1, 2, C)
        return nn.Dense(V, name="head")(modulate(x_BlC, *jnp.split(adaln_B2C, 2, axis=1)))


def var_loss(params, batch, key):
    """Computes the cross-entropy of all 30 tokens (Eq. 6), in one forward pass by the mask."""
    # A tenth of the labels becomes "no class", which guidance needs.
    dropped_B = jax.random.bernoulli(key, 0.1, batch["label"].shape)
    label_B = jnp.where(dropped_B, CLASSES, batch["label"])
    logits_BLV = VAR().bind({"params": params})(batch["input"], label_B)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BLV, batch["token"]))


# Sampling: four forward passes.
@jax.jit
def sample(params, tokenizer_params, label_B, key_B, guidance):
    """Draws the K token maps; returns tokens (B, L) and the K partial sums f_hat.

    Guidance s: logits = u + s (c - u), of the class (c) and of no class (u); s = 1 is none. It
    grows from 1 at the first scale to `guidance` at the last, as in the official code.
    """
    tokenizer = Tokenizer().bind({"params": tokenizer_params})
    B = len(label_B)
    f_hat_BhwZ, input_BlZ = jnp.zeros((B, SIDE, SIDE, Z)), jnp.zeros((B, 0, Z))
    label_2B = jnp.concatenate([label_B, jnp.full_like(label_B, CLASSES)])
    tokens, f_hats = [], []
    for k in range(K):
        # No cache: each pass repeats the coarser scales, whose tokens see nothing of the finer.
        logits_2BlV = VAR().bind({"params": params})(jnp.tile(input_BlZ, (2, 1, 1)), label_2B)
        with_class_BlV, without_BlV = jnp.split(logits_2BlV[:, ENDS[k] :], 2)
        s = 1 + (guidance - 1) * k / (K - 1)
        logits_BlV = without_BlV + s * (with_class_BlV - without_BlV)
        # One key per image, so that no image depends on the others of its batch.
        key_of_scale_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, k)
        tokens.append(jax.vmap(jax.random.categorical)(key_of_scale_B, logits_BlV))
        f_hat_BhwZ = tokenizer.add_scale(f_hat_BhwZ, tokens[-1], k)
        f_hats.append(f_hat_BhwZ)
        if k + 1 < K:
            next_BlZ = downsample(f_hat_BhwZ, SCALES[k + 1])
            input_BlZ = jnp.concatenate([input_BlZ, next_BlZ], axis=1)
    return jnp.concatenate(tokens, axis=1), f_hats


# Training, the same for both stages.
def fit(loss_fn, params, data, steps, lr, batch_size=64):
    """Trains by AdamW on random batches; returns the moving average of the parameters."""
    schedule = optax.warmup_cosine_decay_schedule(0, lr, steps // 20, steps)
    adamw = optax.adamw(schedule, b2=0.95, weight_decay=0.05)
    optimizer = optax.chain(optax.clip_by_global_norm(1), adamw)
    data = jax.tree.map(jnp.asarray, data)

    @jax.jit
    def step(params, ema, opt_state, data, i):
        batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        index_B = jax.random.randint(batch_key, (batch_size,), 0, len(data["label"]))
        batch = jax.tree.map(lambda x_N: x_N[index_B], data)
        loss, grads = jax.value_and_grad(loss_fn)(params, batch, loss_key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, ema, 0.01), opt_state, loss

    ema, opt_state, start = params, optimizer.init(params), time.time()
    for i in range(steps):
        params, ema, opt_state, loss = step(params, ema, opt_state, data, i)
        if (i + 1) % 200 == 0:
            print(f"step {i + 1}: loss {loss:.3f}, {time.time() - start:.0f} s", flush=True)
    return ema


def save_picture(name, rows):
    """Writes a grid of images, which are float, and of token maps, which are integers."""

    def draw(x_hw):
        is_image, size = x_hw.dtype == np.float32, 48 // len(x_hw)
        cmap, x_hw = ("gray_r", (x_hw + 1) / 2) if is_image else ("jet", x_hw / V)
        x_hw4 = np.kron(plt.get_cmap(cmap)(x_hw), np.ones((size, size, 1)))
        return np.pad(x_hw4, ((3, 3), (3, 3), (0, 0)), constant_values=1)

    picture = [np.concatenate([draw(x_hw) for x_hw in row], axis=1) for row in rows]
    plt.imsave(FOLDER / name, np.concatenate(picture))


def main():
    """Trains both stages, prints how good they are, and draws pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    train, held_out = digits()
    real_NHW1, decode = held_out["image"], jax.jit(lambda f_hat: tokenizer.decode(f_hat)[..., 0])
    classifier = SVC(C=10).fit(train["image"][:1438].reshape(-1, 64), train["label"][:1438])
    print("tokenizer")
    params = jax.jit(Tokenizer().init)(jax.random.key(1), real_NHW1[:1])["params"]
    frozen = fit(tokenizer_loss, params, train, steps=1000, lr=2e-3)
    tokenizer = Tokenizer().bind({"params": frozen})
    decoded_NHW1, _, token_NL, f_hats = jax.jit(lambda x: tokenizer(x))(real_NHW1)
    psnr = -10 * np.log10(np.mean(np.square(decoded_NHW1 - real_NHW1)) / 4)
    print(f"held out: PSNR {psnr:.1f} dB, {len(np.unique(token_NL))} of {V} codes in use")
    # One row per digit: the digit, then each scale's token map and the decoded sum up to it.
    columns = [real_NHW1[:3, :, :, 0]]
    for k, side in enumerate(SCALES):
        columns.append(np.array(token_NL[:3, ENDS[k] : ENDS[k + 1]]).reshape(3, side, side))
        columns.append(np.array(decode(f_hats[k][:3])))
    save_picture("scales.png", [[column[n] for column in columns] for n in range(3)])
    print("transformer")
    for data in train, held_out:  # the tokenizer is frozen, so tokens are computed once
        data["token"], data["input"] = jax.jit(teacher_forcing)(frozen, data.pop("image"))
    params = jax.jit(VAR().init)(jax.random.key(2), held_out["input"], held_out["label"])["params"]
    params = fit(var_loss, params, train, steps=1000, lr=2e-3)
    print(f"held out: loss {jax.jit(var_loss)(params, held_out, jax.random.key(3)):.3f}")
    label_N, key_N = np.tile(np.arange(CLASSES), 10), jax.random.split(jax.random.key(4), 100)
    _, f_hats = sample(params, frozen, label_N, key_N, guidance=1.5)
    image_KNHW = np.stack([decode(f_hat) for f_hat in f_hats]).clip(-1, 1)
    right = classifier.score(image_KNHW[-1].reshape(-1, 64), label_N)
    real_right = classifier.score(real_NHW1.reshape(-1, 64), held_out["label"])
    print(f"a classifier reads {right:.0%} of 100 samples right, {real_right:.1%} of real digits")
    save_picture("sampling.png", image_KNHW[:, :10])  # the first ten after each scale
    save_picture("samples.png", image_KNHW[-1].reshape(10, 10, 8, 8))
    plt.imsave(FOLDER / "mask.png", np.kron(MASK_LL, np.ones((8, 8))), cmap="Blues")


if __name__ == "__main__":
    main()
