"""The network as a model of the diffusers library: a config.json beside safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.nn.nested import NestedUNet, renamed
from matryoshka_diffusion.pyramid import Pyramid


class MDMNetwork(ModelMixin, ConfigMixin):
    """A nest with the config of its run.

    Attributes:
        net: the nest.
        run_config: the run's resolved `RunConfig`.
    """

    @register_to_config
    def __init__(self, run: dict[str, Any], levels: int) -> None:
        """`run` is a `RunConfig` in JSON's types; the nest has the first `levels` of its levels.

        Raises:
            ConfigError: `run` is no such config.
        """
        super().__init__()
        self.run_config = from_dict(run, where="the network's config.json")
        self.net = NestedUNet(self.run_config.model.first(levels))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path | None, **options: Any
    ) -> MDMNetwork:
        """Load from a folder or the hub; `options` are those of `ModelMixin.from_pretrained`.

        Raises:
            ValueError: weights are missing or of no use, where diffusers would only warn.
            OSError: a file is missing or damaged.
        """
        strict = {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **(options | strict))
        network, loading = loaded
        problems = {
            kind: sorted(str(key) for key in keys) for kind, keys in loading.items() if keys
        }
        if problems:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit its config: {problems}; it belongs "
                "to another config or version"
            )
        return network

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> None:
        """Rename, in place, what version 0.1.0 exported: diffusers calls this before it loads."""
        for name in list(state_dict):
            state_dict[renamed(name)] = state_dict.pop(name)

    def forward(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        """As `NestedUNet.forward`; with weights of half precision it runs under autocast."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(z[0].device.type, self.dtype if half else None, enabled=half):
            return self.net(z, t, cond)


class CalledNest(NestedUNet):
    """A network component in the form that `Matryoshka` takes: calls go through the component.

    So everything counts that a pipeline's user hangs on it, such as offloading. It has no weights
    itself: to move or to set it moves and sets nothing.
    """

    def __init__(self, component: MDMNetwork) -> None:
        nn.Module.__init__(self)
        self.config = component.net.config
        # In tuples, because modules as attributes would be registered.
        self.levels = tuple(component.net.levels)
        self._component = (component,)

    def forward(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        return self._component[0](z, t, cond)
