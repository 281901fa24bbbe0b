"""An encoder that reads virtual tokens beside its input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lora_jax.models import Network
from lora_jax.models.virtual import Virtual
from lora_jax.prompts.encoders import encoded
from lora_jax.prompts.sizes import keys_and_values, sizes_of, without_prompt


@dataclass(frozen=True, eq=False)
class PromptedNetwork(Network):
    """A BERT or ViT that reads `length` virtual tokens beside each row; used like any `Network`.

    `encode(params["prompt"])` gives them: embeddings [n, D] ([L, n, D] where every layer has its
    own), or with `keys_values` what every layer attends to, [n, 2 L K d]. They stand before a text,
    whose positions go on from n, and between the class token and the patches of an image. `apply`
    gives hidden states of the input alone; so do `features` of an image. Those of a text pool its
    longer sequence, virtual embeddings and all, as is usual with PEFT.
    """

    length: int = 0
    keys_values: bool = False

    def encode(self, prompt: Mapping[str, Any]) -> jax.Array:
        """The virtual tokens that the parameters `prompt` stand for."""
        return encoded(prompt, self.keys_values)

    def exported(self, params: Mapping[str, Any]) -> PromptedNetwork:
        """What stays after training: these parameters with the encoder's outputs in its place."""
        made = {**params, "prompt": {"embedding": self.encode(params["prompt"])}}
        return dataclasses.replace(self, params=made)


def prompted_network(
    network: Network, prompt: Mapping[str, Any], length: int, keys_values: bool
) -> PromptedNetwork:
    """The network with virtual tokens, of which `prompt` are the parameters; with a head or not."""
    sizes = sizes_of(network)

    def given(function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of the network's parameters and inputs, with the virtual tokens."""

        def run(params: Mapping[str, Any], *inputs: Any, **named: Any) -> Any:
            made = encoded(params["prompt"], keys_values)
            virtual = Virtual(tokens=made)
            if keys_values:
                virtual = Virtual(keys_values=keys_and_values(made, sizes))
            return function(without_prompt(params), *inputs, virtual=virtual, **named)

        return run

    known = {field.name: getattr(network, field.name) for field in dataclasses.fields(Network)}
    known |= {"apply": given(network.apply), "params": {**network.params, "prompt": prompt}}
    known["features"] = network.features and given(network.features)
    return PromptedNetwork(**known, length=length, keys_values=keys_values)
