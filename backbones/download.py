"""Fetch both backbones of a config ahead of the run: `python -m backbones.download [--config FILE] [key=value …]`.

Nothing else needs a network afterwards; `HF_HUB_OFFLINE=1` makes sure of it. `HF_ENDPOINT` names a mirror,
`hub=modelscope` asks ModelScope.
"""

from cli import run_script, script_arguments

from backbones.backbone import locate_backbone
from config import load_config


def main(arguments: list[str] | None = None) -> None:
    args = script_arguments(__doc__).parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    for key, section in (("visual.path", config.visual), ("llm.path", config.llm)):
        print(f"{key}: {section.path} is in {locate_backbone(section.path, config.model_root, key, config.hub)}")


if __name__ == "__main__":
    run_script(main)
