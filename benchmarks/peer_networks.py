"""Networks of other libraries, with the losses and samplers that their trainers use.

    python -m benchmarks.peers

compares them. Each network is the one of its library's examples, in widths that give it the FLOPs
of a nest. The two networks with text attend to it at their coarsest sides, as the nest does. Only
what a network needs of its library is imported: denoising-diffusion-pytorch and imagen-pytorch
import torchvision as well, for their data sets.
"""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.steps import WORDS

TEXT_FEATURES = 384
Widths = tuple[int, ...]
"""Channels at every side of a UNet, finest first."""


class Task(NamedTuple):
    """Sizes of images, evaluations and the device that a network is built for."""

    side: int
    channels: int
    evaluations: int
    """Network evaluations for a sample."""
    device: torch.device

    def text(self, count: int) -> Float[Tensor, "n w d"]:
        """Features of as many captions."""
        return torch.randn(count, WORDS, TEXT_FEATURES, device=self.device)


class Peer(NamedTuple):
    """A network with the loss and the sampler of its library.

    `average` makes the library's average of the weights and returns what updates it; `clip` is the
    norm to which the library's trainer clips gradients.
    """

    net: nn.Module
    loss: Callable[[Float[Tensor, "n c h w"]], Float[Tensor, ""]]
    sample: Callable[[int], Tensor]
    average: Callable[[nn.Module], Callable[[], object]]
    clip: float | None


class Kind(NamedTuple):
    """A library's network: its package, what else it imports, and how it is built."""

    distribution: str
    imports: tuple[str, ...]
    build: Callable[[Task, Widths], Peer]
    widths: Mapping[int, Widths]
    """Shapes with the FLOPs of `openmoji`, by the factor of that nest's own widths."""

    def missing(self) -> list[str]:
        """The names of its imports that are not installed."""
        return [name for name in self.imports if find_spec(name) is None]


def forward_flops(kind: Kind, task: Task, widths: Widths) -> int:
    """FLOPs (two for each multiply-add) of a forward pass for one image, counted on shapes."""
    nowhere = torch.device("meta")
    with nowhere, torch.no_grad(), FlopCounterMode(display=False) as counter:
        peer = kind.build(task._replace(device=nowhere), widths)
        peer.loss(torch.empty(1, task.channels, task.side, task.side))
    return counter.get_total_flops()


# --- modules without what they do not need -------------------------------------------------------


def package_alone(name: str) -> ModuleType:
    """A package whose `__init__` is not run, so that its modules can be imported one by one."""
    if name not in sys.modules:
        spec = find_spec(name)
        assert spec is not None, f"{name} is not installed"
        sys.modules[name] = module_from_spec(spec)
    return sys.modules[name]


@cache
def module_without(name: str, *absent: str) -> ModuleType:
    """Import a module of a package without its imports of the packages in `absent`."""
    package, _, stem = name.rpartition(".")
    path = Path(package_alone(package).__path__[0], f"{stem}.py")
    tree = ast.parse(path.read_text("utf-8"))
    tree.body = [part for part in tree.body if not _imports(part, absent)]
    module = sys.modules[name] = ModuleType(name)
    module.__package__ = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, about their code
        exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def _imports(part: ast.stmt, packages: Sequence[str]) -> bool:
    if isinstance(part, ast.Import):
        names = [alias.name for alias in part.names]
    else:
        names = [part.module or ""] if isinstance(part, ast.ImportFrom) else []
    return any(name.partition(".")[0] in packages for name in names)


# --- the libraries -------------------------------------------------------------------------------


def denoising_diffusion(task: Task, widths: Widths) -> Peer:
    """denoising-diffusion-pytorch: Unet, GaussianDiffusion with DDIM, and ema-pytorch."""
    module = module_without(
        "denoising_diffusion_pytorch.denoising_diffusion_pytorch", "torchvision"
    )
    module.__dict__["tqdm"] = lambda steps, **_: steps
    net = module.Unet(
        widths[0],
        dim_mults=tuple(width // widths[0] for width in widths),
        channels=task.channels,
        flash_attn=True,
    )
    diffusion = module.GaussianDiffusion(
        net, image_size=task.side, sampling_timesteps=task.evaluations
    ).to(task.device)
    average = partial(_ema_pytorch, beta=0.995, update_every=10)
    return Peer(net, diffusion, diffusion.sample, average, 1.0)


def imagen(task: Task, widths: Widths) -> Peer:
    """imagen-pytorch: one text-conditional Unet, Imagen with its sampler, and ema-pytorch."""
    package_alone("imagen_pytorch")
    t5 = importlib.import_module("imagen_pytorch.t5")
    # The default of an argument, which would be looked up on the Hugging Face hub.
    config = importlib.import_module("transformers").T5Config(d_model=TEXT_FEATURES)
    t5.T5_CONFIGS[t5.DEFAULT_T5_NAME] = {"config": config}
    module = module_without("imagen_pytorch.imagen_pytorch", "torchvision", "kornia")
    module.__dict__["print_once"] = lambda advice: None  # about widths below 128
    attending = (*(False,) * (len(widths) - 1), True)
    unet = module.Unet(
        dim=widths[0],
        dim_mults=tuple(width // widths[0] for width in widths),
        channels=task.channels,
        layer_attns=attending,
        layer_cross_attns=attending,
        text_embed_dim=TEXT_FEATURES,
        max_text_len=WORDS,
    )
    model = module.Imagen(
        unet,
        image_sizes=task.side,
        channels=task.channels,
        timesteps=task.evaluations,
        text_embed_dim=TEXT_FEATURES,
    ).to(task.device)

    def loss(pictures: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        return model(pictures, text_embeds=task.text(len(pictures)), unet_number=1)

    def sample(count: int) -> Tensor:
        text = task.text(count)
        return model.sample(text_embeds=text, use_tqdm=False, use_one_unet_in_gpu=False)

    return Peer(model.get_unet(1), loss, sample, _ema_pytorch, None)


def _ema_pytorch(net: nn.Module, **options: Any) -> Callable[[], object]:
    return importlib.import_module("ema_pytorch").EMA(net, **options).update


def diffusers_2d(task: Task, widths: Widths) -> Peer:
    """diffusers: UNet2DModel, as in its example of unconditional training."""
    library: Any = importlib.import_module("diffusers")
    plain = ["DownBlock2D"] * (len(widths) - 2)
    down = (*plain, "AttnDownBlock2D", "DownBlock2D")
    net = library.UNet2DModel(
        sample_size=task.side,
        in_channels=task.channels,
        out_channels=task.channels,
        block_out_channels=widths,
        norm_num_groups=8,
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
    )
    return _of_diffusers(task, net.to(task.device), lambda count: ())


def diffusers_text(task: Task, widths: Widths) -> Peer:
    """diffusers: UNet2DConditionModel, as in its example of text-to-image training."""
    library: Any = importlib.import_module("diffusers")
    down = ("DownBlock2D",) * (len(widths) - 2) + ("CrossAttnDownBlock2D",) * 2
    net = library.UNet2DConditionModel(
        sample_size=task.side,
        in_channels=task.channels,
        out_channels=task.channels,
        block_out_channels=widths,
        norm_num_groups=8,
        cross_attention_dim=TEXT_FEATURES,
        attention_head_dim=4,  # the number of heads, in spite of its name
        down_block_types=down,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
    )
    return _of_diffusers(task, net.to(task.device), lambda count: (task.text(count),))


def _of_diffusers(task: Task, net: nn.Module, text: Callable[[int], tuple[Tensor, ...]]) -> Peer:
    """The loss, DDIM sampler and average of diffusers' examples around one of its networks."""
    library: Any = importlib.import_module("diffusers")
    averages: Any = importlib.import_module("diffusers.training_utils")
    schedule = library.DDIMScheduler()

    def loss(pictures: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
        noise = torch.randn_like(pictures)
        t = torch.randint(1000, (len(pictures),), device=task.device)
        noisy = schedule.add_noise(pictures, noise, t)
        return nn.functional.mse_loss(net(noisy, t, *text(len(pictures))).sample.float(), noise)

    @torch.no_grad()
    def sample(count: int) -> Tensor:
        x = torch.randn(count, task.channels, task.side, task.side, device=task.device)
        schedule.set_timesteps(task.evaluations)
        words = text(count)
        for t in schedule.timesteps:
            x = schedule.step(net(x, t, *words).sample, int(t), x).prev_sample
        return x

    def average(net: nn.Module) -> Callable[[], object]:
        ema = averages.EMAModel(net.parameters())
        return lambda: ema.step(net.parameters())

    return Peer(net, loss, sample, average, 1.0)


KINDS = {
    "denoising-diffusion-pytorch Unet": Kind(
        "denoising-diffusion-pytorch",
        ("denoising_diffusion_pytorch", "einops", "ema_pytorch", "accelerate", "scipy"),
        denoising_diffusion,
        {1: (8, 16, 32, 32), 3: (32, 64, 128, 256)},
    ),
    "imagen-pytorch Unet": Kind(
        "imagen-pytorch",
        ("imagen_pytorch", "einops", "ema_pytorch", "beartype", "transformers"),
        imagen,
        {1: (8, 24, 64, 64), 3: (40, 80, 160, 200)},
    ),
    "diffusers UNet2DModel": Kind(
        "diffusers",
        ("diffusers",),
        diffusers_2d,
        {1: (16, 16, 32, 32, 56, 56), 3: (48, 48, 80, 80, 160, 160)},
    ),
    "diffusers UNet2DConditionModel": Kind(
        "diffusers",
        ("diffusers",),
        diffusers_text,
        {1: (8, 16, 40, 40), 3: (24, 56, 112, 112)},
    ),
}
"""Networks of other libraries, by the name of their rows."""
