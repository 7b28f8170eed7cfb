"""MAR in one file: an image's continuous tokens are drawn in random order, a set at a time.

    python examples/nano_mar.py    # five minutes on two CPU cores; pictures in runs/nano_mar

Sections are those of the paper: Li et al. 2024, arXiv 2406.11838.

An image of 8x8 pixels is 16 tokens: patches of 2x2 pixels, so vectors of 4 real numbers. There is
no codebook. Three ideas make this work:

1. A transformer reads the tokens that are known and computes a vector z for every position. It does
   not predict tokens: z describes the distribution of the token at its position (section 3.2).
2. A small MLP draws a token x from p(x | z) by diffusion. It is trained together with the
   transformer, by the usual loss |noise - predicted noise|^2: the "diffusion loss" (section 3.2).
3. Tokens are drawn in random order, first few at a time and then many (section 3.4):

       p(x_1, ..., x_L) = product over k of p(X_k | X_1, ..., X_{k-1}),  X_k a set of tokens

Left out here, and part of varjax: the KL tokenizer, whose latents take the place of pixels; the
learned variance of diffusion; dropout; editing; causal attention; computing known tokens only.

An array's name ends in its shape, one letter per axis: B images, N items, H W pixels, L positions,
n positions with the buffer, m new tokens, Z numbers of a token, C and E widths, A attention heads,
D their size, T timesteps, J timesteps of sampling, U noise levels per token.
"""

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

PATCH, SIDE = 2, 4
L, Z = SIDE * SIDE, PATCH * PATCH
C, A, DEPTH = 96, 4, 2  # the transformer; depth of the encoder, and of the decoder
E, MLP_DEPTH = 128, 2
BUFFER = 4  # copies of the class embedding in front of the tokens; the paper has 64
T, J, U = 1000, 100, 2
STEPS = 8
CLASSES = 10  # digits; label 10 means "no class"
FOLDER = pathlib.Path("runs/nano_mar")


def digits():
    """Returns training data and held-out data: images (N, 8, 8) in [-1, 1] and labels (N,)."""
    image_NC, label_N = load_digits(return_X_y=True)
    image_NHW = np.asarray(image_NC, np.float32).reshape(-1, 8, 8)
    held_out_N, rng = np.arange(len(label_N)) % 5 == 4, np.random.default_rng(0)
    # Ten altered copies of each image: a transformer would soon memorize 1,438 images.
    train_NHW, train_N = np.tile(image_NHW[~held_out_N], (10, 1, 1)), label_N[~held_out_N]
    train_NHW = np.stack([augment(image_HW, rng) for image_HW in train_NHW])
    train = {"image": train_NHW / 8 - 1, "label": np.tile(train_N, 10)}
    return train, {"image": image_NHW[held_out_N] / 8 - 1, "label": label_N[held_out_N]}


def augment(image_HW, rng):
    """Rotates by up to 6 degrees, scales by up to 6 % and shifts by up to 0.3 pixels."""
    turn, zoom, x, y = rng.uniform(-1, 1, 4) * (np.radians(6), 0.06, 0.3, 0.3)
    a, b = (1 + zoom) * np.cos(turn), (1 + zoom) * np.sin(turn)
    # Two rows of the affine map from output pixels to input pixels; the center stays at (4, 4).
    affine = a, b, 4 * (1 - a - b) + x, -b, a, 4 * (1 - a + b) + y
    how = Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    return np.clip(np.array(Image.fromarray(image_HW).transform((8, 8), *how)), 0, 16)


def patchify(image_BHW):
    """Cuts images (B, 8, 8) into tokens (B, L, Z), row by row."""
    x = image_BHW.reshape(-1, SIDE, PATCH, SIDE, PATCH)
    return x.swapaxes(2, 3).reshape(-1, L, Z)


def unpatchify(token_BLZ):
    """Joins tokens (B, L, Z) to images (B, 8, 8)."""
    x = token_BLZ.reshape(-1, SIDE, SIDE, PATCH, PATCH)
    return x.swapaxes(2, 3).reshape(-1, SIDE * PATCH, SIDE * PATCH)


# The transformer (section 4.2): z of every position from the known tokens.
class Block(nn.Module):
    """Adds attention and an MLP to its input, as in ViT; `seen_Bn` says which tokens are seen."""

    @nn.compact
    def __call__(self, x_BnC, seen_Bn):
        B, length, _ = x_BnC.shape
        qkv_Bn3AD = nn.Dense(3 * C, name="qkv")(norm("norm1")(x_BnC))
        q_BnAD, k_BnAD, v_BnAD = jnp.moveaxis(qkv_Bn3AD.reshape(B, length, 3, A, C // A), 2, 0)
        logits_BAnn = jnp.einsum("BnAD,BmAD->BAnm", q_BnAD, k_BnAD) / math.sqrt(C // A)
        weight_BAnn = nn.softmax(jnp.where(seen_Bn[:, None, None], logits_BAnn, -jnp.inf))
        y_BnC = jnp.einsum("BAnm,BmAD->BnAD", weight_BAnn, v_BnAD).reshape(B, length, C)
        x_BnC = x_BnC + nn.Dense(C, name="proj")(y_BnC)
        h_Bn4C = nn.gelu(nn.Dense(4 * C, name="up")(norm("norm2")(x_BnC)), approximate=False)
        return x_BnC + nn.Dense(C, name="down")(h_Bn4C)


def norm(name, affine=True):
    """Makes a layer norm."""
    return nn.LayerNorm(epsilon=1e-6, use_scale=affine, use_bias=affine, name=name)


class MAR(nn.Module):
    """Encodes the known tokens, then decodes all positions, as a masked autoencoder does."""

    @nn.compact
    def __call__(self, token_BLZ, known_BL, label_B):
        """Returns z (B, L, C), which depends on the class and on tokens where `known_BL` is True.

        The encoder should not get unknown tokens at all. Here it gets them, but no token sees them
        as keys and the decoder replaces them: the same result, and shapes that never change.
        """
        normal = nn.initializers.normal(0.5)  # 0.02 in the paper's long runs
        everything_Bn = jnp.ones((len(label_B), BUFFER + L), bool)
        seen_Bn = everything_Bn.at[:, BUFFER:].set(known_BL)
        class_BC = nn.Embed(CLASSES + 1, C, embedding_init=normal, name="class_embed")(label_B)
        buffer_BnC = jnp.repeat(class_BC[:, None], BUFFER, axis=1)
        x_BnC = jnp.concatenate([buffer_BnC, nn.Dense(C, name="z_proj")(token_BLZ)], axis=1)
        x_BnC = x_BnC + self.param("encoder_pos_embed", normal, (1, BUFFER + L, C))
        x_BnC = norm("z_proj_norm")(x_BnC)
        for i in range(DEPTH):
            x_BnC = Block(name=f"encoder_{i}")(x_BnC, seen_Bn)
        x_BnC = nn.Dense(C, name="decoder_embed")(norm("encoder_norm")(x_BnC))
        x_BnC = jnp.where(seen_Bn[:, :, None], x_BnC, self.param("mask_token", normal, (1, 1, C)))
        x_BnC = x_BnC + self.param("decoder_pos_embed", normal, (1, BUFFER + L, C))
        for i in range(DEPTH):
            x_BnC = Block(name=f"decoder_{i}")(x_BnC, everything_Bn)
        z_BLC = norm("decoder_norm")(x_BnC)[:, BUFFER:]
        return z_BLC + self.param("diffusion_pos_embed", normal, (1, L, C))


# Diffusion of one token (section 4.1): the cosine schedule of iDDPM, arXiv 2102.09672.
def cosine(t):
    """Computes the fraction of the signal's variance that is left at time t, from 0 to 1."""
    return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2


BETA_T = np.minimum(1 - cosine(np.arange(1, T + 1) / T) / cosine(np.arange(T) / T), 0.999)
ALPHA_BAR_T = np.cumprod(1 - BETA_T)


def add_noise(x0_NZ, t_N, noise_NZ):
    """Computes x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise."""
    alpha_bar_N1 = jnp.asarray(ALPHA_BAR_T, jnp.float32)[t_N][:, None]
    return jnp.sqrt(alpha_bar_N1) * x0_NZ + jnp.sqrt(1 - alpha_bar_N1) * noise_NZ


class Denoiser(nn.Module):
    """Predicts the noise (N, Z) in tokens x_t from timestep t and z: a small MLP with AdaLN."""

    @nn.compact
    def __call__(self, xt_NZ, t_N, z_NC):
        zeros = nn.initializers.zeros
        frequency_F = jnp.exp(-math.log(10_000) / 128 * jnp.arange(128, dtype=jnp.float32))
        angle_NF = t_N.astype(jnp.float32)[:, None] * frequency_F[None]
        time_NE = jnp.concatenate([jnp.cos(angle_NF), jnp.sin(angle_NF)], axis=1)
        time_NE = nn.Dense(E, name="time_down")(nn.silu(nn.Dense(E, name="time_up")(time_NE)))
        cond_NE = nn.silu(time_NE + nn.Dense(E, name="cond_embed")(z_NC))
        x_NE = nn.Dense(E, name="input_proj")(xt_NZ)
        for i in range(MLP_DEPTH):
            adaln_N3E = nn.Dense(3 * E, kernel_init=zeros, name=f"adaln_{i}")(cond_NE)
            shift_NE, scale_NE, gate_NE = jnp.split(adaln_N3E, 3, axis=1)
            h_NE = norm(f"norm_{i}")(x_NE) * (1 + scale_NE) + shift_NE
            h_NE = nn.silu(nn.Dense(E, name=f"up_{i}")(h_NE))
            x_NE = x_NE + gate_NE * nn.Dense(E, name=f"down_{i}")(h_NE)
        adaln_N2E = nn.Dense(2 * E, kernel_init=zeros, name="adaln")(cond_NE)
        shift_NE, scale_NE = jnp.split(adaln_N2E, 2, axis=1)
        x_NE = norm("norm", affine=False)(x_NE) * (1 + scale_NE) + shift_NE
        return nn.Dense(Z, kernel_init=zeros, name="out")(x_NE)


def init_params(key):
    """Draws the parameters of both networks."""
    token_1LZ, known_1L, label_1 = jnp.zeros((1, L, Z)), jnp.ones((1, L), bool), jnp.zeros(1, int)
    mar = MAR().init(key, token_1LZ, known_1L, label_1)
    denoiser = Denoiser().init(key, token_1LZ[0], jnp.zeros(L, int), jnp.zeros((L, C)))
    return {"mar": mar["params"], "denoiser": denoiser["params"]}


def diffusion_loss(params, token_BLZ, label_B, known_BL, t_BLU, noise_BLUZ):
    """Computes the mean square error of the predicted noise: (B, L, U), for U draws per token.

    The loss of section 3.2: E |noise - predicted(x_t | t, z)|^2. Its gradient reaches the
    transformer through z. The MLP is small, so several noise levels per token cost little.
    """
    z_BLC = MAR().bind({"params": params["mar"]})(token_BLZ, known_BL, label_B)
    x0_NZ, z_NC = (jnp.repeat(x.reshape(-1, x.shape[-1]), U, axis=0) for x in (token_BLZ, z_BLC))
    t_N, noise_NZ = t_BLU.reshape(-1), noise_BLUZ.reshape(-1, Z)
    xt_NZ = add_noise(x0_NZ, t_N, noise_NZ)
    predicted_NZ = Denoiser().bind({"params": params["denoiser"]})(xt_NZ, t_N, z_NC)
    return jnp.mean(jnp.square(noise_NZ - predicted_NZ), axis=1).reshape(t_BLU.shape)


def mar_loss(params, batch, key):
    """Masks a random part of each image, and averages the loss of the masked tokens."""
    B, keys = len(batch["label"]), jax.random.split(key, 5)
    # A tenth of the labels becomes "no class", which guidance needs.
    label_B = jnp.where(jax.random.bernoulli(keys[0], 0.1, (B,)), CLASSES, batch["label"])
    # The mask ratio: normal around 1, cut off to [0.1, 1]; the paper has [0.7, 1] (section 4.2).
    ratio_B = 1 + 0.25 * jax.random.truncated_normal(keys[1], (0.1 - 1) / 0.25, 0, (B,))
    rank_BL = jnp.argsort(jax.random.uniform(keys[2], (B, L)), axis=1)
    known_BL = rank_BL < (L - jnp.ceil(L * ratio_B))[:, None]
    t_BLU = jax.random.randint(keys[3], (B, L, U), 0, T)
    noise_BLUZ = jax.random.normal(keys[4], (B, L, U, Z))
    loss_BLU = diffusion_loss(params, batch["token"], label_B, known_BL, t_BLU, noise_BLUZ)
    return jnp.sum(jnp.where(known_BL[:, :, None], 0, loss_BLU)) / jnp.sum(~known_BL) / U


# Sampling: the reverse process for one set of tokens, then set after set.
TIMESTEP_J = np.linspace(0, T - 1, J).round().astype(np.int32)  # every tenth of 1,000


def reverse_diffusion(predict_noise, noise_JNZ):
    """Draws tokens x_0 (N, Z) from noise, step by step (DDPM, arXiv 2006.11239, algorithm 2).

    `predict_noise` maps x_t (N, Z) and t to the noise in x_t. noise_JNZ[0] is the first x_t.
    """
    alpha_bar_J = ALPHA_BAR_T[TIMESTEP_J]
    before_J = np.append(1, alpha_bar_J[:-1])  # alpha_bar of the step that follows in sampling
    beta_J = 1 - alpha_bar_J / before_J
    x0_factor_J = np.sqrt(before_J) * beta_J / (1 - alpha_bar_J)
    xt_factor_J = np.sqrt(1 - beta_J) * (1 - before_J) / (1 - alpha_bar_J)
    sigma_J = np.sqrt(beta_J * (1 - before_J) / (1 - alpha_bar_J))  # 0 in the last step

    def step(xt_NZ, at):
        t, alpha_bar, x0_factor, xt_factor, sigma, noise_NZ = at
        predicted_NZ = predict_noise(xt_NZ, t)
        x0_NZ = (xt_NZ - jnp.sqrt(1 - alpha_bar) * predicted_NZ) / jnp.sqrt(alpha_bar)
        # The first step divides by almost 0, so a small error would throw the token far away.
        x0_NZ = jnp.clip(x0_NZ, -1, 1)  # the range of the data
        return x0_factor * x0_NZ + xt_factor * xt_NZ + sigma * noise_NZ, None

    float_tables = [np.float32(x_J) for x_J in (alpha_bar_J, x0_factor_J, xt_factor_J, sigma_J)]
    return jax.lax.scan(step, noise_JNZ[0], (TIMESTEP_J, *float_tables, noise_JNZ), reverse=True)[0]


# Tokens known before each step, and in the end, by a cosine: 0, 1, 2, 3, 5, 8, 10, 13, 16
# (section 4.2). The more is known, the more tokens are drawn at once.
KNOWN = [L - int(L * math.cos(math.pi / 2 * i / STEPS)) for i in range(STEPS + 1)]


@jax.jit
def sample(params, label_B, order_BL, noise_JBLZ, guidance):
    """Draws all tokens; returns a list of the tokens (B, L, Z) after each step.

    `order_BL` lists the positions of each image in the order in which they are drawn. Guidance s:
    noise = u + s (c - u), as predicted with the class (c) and without (u); s = 1 is none.
    """
    B, rank_BL = len(label_B), jnp.argsort(order_BL, axis=1)
    label_2B = jnp.concatenate([label_B, jnp.full_like(label_B, CLASSES)])
    token_BLZ, steps = jnp.zeros((B, L, Z)), []
    for i in range(STEPS):
        known_BL = rank_BL < KNOWN[i]
        known = jnp.tile(token_BLZ, (2, 1, 1)), jnp.tile(known_BL, (2, 1))
        z_2BLC = MAR().bind({"params": params["mar"]})(*known, label_2B)
        new_Bm1 = order_BL[:, KNOWN[i] : KNOWN[i + 1], None]  # the positions of this step's set
        z_2NC = jnp.take_along_axis(z_2BLC, jnp.tile(new_Bm1, (2, 1, 1)), axis=1).reshape(-1, C)
        noise_JBmZ = jnp.take_along_axis(noise_JBLZ, new_Bm1[None], axis=2)

        def predict_noise(xt_NZ, t, z_2NC=z_2NC):
            xt_2NZ, t_2N = jnp.tile(xt_NZ, (2, 1)), jnp.full(len(z_2NC), t)
            both_2NZ = Denoiser().bind({"params": params["denoiser"]})(xt_2NZ, t_2N, z_2NC)
            with_class_NZ, without_NZ = jnp.split(both_2NZ, 2)
            return without_NZ + guidance * (with_class_NZ - without_NZ)

        new_NZ = reverse_diffusion(predict_noise, noise_JBmZ.reshape(J, -1, Z))
        image_B1 = jnp.arange(B)[:, None]
        token_BLZ = token_BLZ.at[image_B1, new_Bm1[:, :, 0]].set(new_NZ.reshape(B, -1, Z))
        steps.append(token_BLZ)
    return steps


def fit(loss_fn, params, data, steps, lr, batch_size=64):
    """Trains by AdamW on random batches; returns the moving average of the parameters."""
    schedule = optax.warmup_cosine_decay_schedule(0, lr, steps // 20, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(3), optax.adamw(schedule, b2=0.95, weight_decay=0.02)
    )
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
    """Writes a grid of images, which are float, and of numbers of steps, which are integers."""
    gray = plt.get_cmap("gray_r").with_extremes(bad="lightblue")  # NaN: not known yet

    def draw(x_hw):
        is_image, size = x_hw.dtype == np.float32, 48 // len(x_hw)
        x_hw4 = gray((x_hw + 1) / 2) if is_image else plt.get_cmap("viridis")(x_hw / STEPS)
        x_hw4 = np.kron(x_hw4, np.ones((size, size, 1)))
        return np.pad(x_hw4, ((3, 3), (3, 3), (0, 0)), constant_values=1)

    picture = [np.concatenate([draw(x_hw) for x_hw in row], axis=1) for row in rows]
    plt.imsave(FOLDER / name, np.concatenate(picture))


def main():
    """Trains the model, prints how good it is, and draws pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    train, held_out = digits()
    classifier = SVC(C=10).fit(train["image"][:1438].reshape(-1, 64), train["label"][:1438])
    real_right = classifier.score(held_out["image"].reshape(-1, 64), held_out["label"])
    for data in train, held_out:
        data["token"] = patchify(data.pop("image"))
    # What the MLP learns to undo: a digit at some of the noise levels.
    token_NZ, t_5 = held_out["token"][0], (0, 250, 500, 750, 999)
    noise_NZ = jax.random.normal(jax.random.key(1), token_NZ.shape)
    noisy = [unpatchify(add_noise(token_NZ, jnp.full(L, t), noise_NZ))[0] for t in t_5]
    save_picture("noise.png", [noisy])
    params = fit(mar_loss, jax.jit(init_params)(jax.random.key(2)), train, steps=1200, lr=2e-3)
    print(f"held out: loss {jax.jit(mar_loss)(params, held_out, jax.random.key(4)):.3f}")

    label_N, keys = np.tile(np.arange(CLASSES), 10), jax.random.split(jax.random.key(5))
    order_NL = jnp.argsort(jax.random.uniform(keys[0], (100, L)), axis=1)
    noise_JNLZ = jax.random.normal(keys[1], (J, 100, L, Z))
    steps = sample(params, label_N, order_NL, noise_JNLZ, guidance=1.5)
    image_NHW = np.array(unpatchify(steps[-1])).clip(-1, 1)
    right = classifier.score(image_NHW.reshape(-1, 64), label_N)
    print(f"a classifier reads {right:.0%} of 100 samples right, {real_right:.1%} of real digits")
    save_picture("samples.png", image_NHW.reshape(10, 10, 8, 8))
    # One row per digit: the step at which each position is drawn, then the image after each step.
    step_NL = np.searchsorted(KNOWN, np.argsort(order_NL, axis=1), side="right") - 1
    columns = [step_NL.reshape(-1, SIDE, SIDE)]
    for i, token_NLZ in enumerate(steps):
        columns.append(np.array(unpatchify(jnp.where(step_NL[..., None] <= i, token_NLZ, jnp.nan))))
    save_picture("steps.png", [[column[n] for column in columns] for n in range(3)])


if __name__ == "__main__":
    main()
