"""Which adapters the settings name, and what is wrong with them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from vllm.entrypoints.openai.models.protocol import LoRAModulePath

from serve_app.config import Settings, SettingsError, parse_settings

PIRATE = {"name": "pirate", "path": "/models/pirate"}
SAILOR = {"name": "org/sailor:v2", "path": "/models/sailor", "base_model_name": "m"}


def settings(engine: dict[str, Any], **changes: Any) -> Settings:
    return parse_settings(
        {
            "model": {"id": "m", "source": "/models/m"},
            "discovery": {"kind": "static", "peers": []},
            "engine": {"enable_lora": True, **engine},
            **changes,
        }
    )


def test_all_are_served_in_order_of_their_names() -> None:
    assert settings({"lora_modules": [PIRATE, SAILOR]}).adapters() == ("org/sailor:v2", "pirate")
    assert settings({"lora_modules": []}).adapters() == ()
    assert settings({}).adapters() == ()


def test_each_side_may_have_them_elsewhere() -> None:
    elsewhere = {"engine": {"lora_modules": [{**PIRATE, "path": "/other"}]}}
    assert settings({"lora_modules": [PIRATE]}, decode=elsewhere).adapters() == ("pirate",)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"lora_modules": "pirate=/p"}, "lora_modules: Input should be a valid list; write a list"),
        ({"lora_modules": ["pirate=/p"]}, "lora_modules.0: Input should be a valid dict"),
        ({"lora_modules": [PIRATE, {"name": "a"}]}, "lora_modules.1.path: Field required"),
        ({"lora_modules": [{**PIRATE, "name": ""}]}, "lora_modules.0.name: String should have"),
        ({"lora_modules": [{**PIRATE, "name": 5}]}, "lora_modules.0.name: Input should be a valid"),
        ({"lora_modules": [{**PIRATE, "rank": 8}]}, "lora_modules.0.rank: Extra inputs are not"),
        ({"lora_modules": [PIRATE, PIRATE]}, "two adapters with the name pirate"),
        ({"lora_modules": [{**PIRATE, "name": "m"}]}, "an adapter with the model's own name, m"),
        ({"lora_modules": [PIRATE], "enable_lora": False}, "lora_modules needs enable_lora: true"),
    ],
)
def test_what_vllm_would_not_load_is_refused(engine: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings(engine)
    assert said in str(caught.value)


def test_both_sides_need_them() -> None:
    with pytest.raises(SettingsError) as caught:
        settings({}, decode={"engine": {"lora_modules": [PIRATE]}})
    assert "lora_modules has pirate on one side only" in str(caught.value)


def test_vllm_takes_what_the_settings_take() -> None:
    loaded: Any = FrontendArgs(lora_modules=[SAILOR]).lora_modules
    assert dataclasses.asdict(loaded[0]) == {**SAILOR, "is_3d_lora_weight": False}
    assert {field.name for field in dataclasses.fields(LoRAModulePath)} == {
        *("name", "path", "base_model_name", "is_3d_lora_weight")
    }
