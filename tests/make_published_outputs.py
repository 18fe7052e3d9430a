"""Makes tests/actors/outputs: what the original packages answer to the prompts of `tests.published_experts`.

    python -m tests.make_published_outputs sam2        where sam2==1.1.0 is installed
    python -m tests.make_published_outputs sam_med2d   where a checkout of OpenGVLab/SAM-Med2D is first on PYTHONPATH

Neither is among this project's dependencies. The arrays of a case are `{prompts}_scores` [n, m], of all masks that the
predictor returns, and of the one of highest score `{prompts}_logits` [n, h, w] (every `STRIDE`-th pixel where there are
more than `LOGITS` a side) and `{prompts}_masks` [n, H, W / 8], with packed bits. `shapes` is the `checkpoint_digest` of
the weights that an image needs; `beside` has the names of the others.
"""

# mypy: ignore-errors

import sys

import numpy as np
import torch

from tests.published_experts import (
    IMAGE,
    LOGITS,
    OUTPUTS,
    PROMPTS,
    SAM2,
    SAM_MED2D,
    STRIDE,
    checkpoint_digest,
    weight,
)

OF_IMAGE = (
    "image_encoder.",
    "prompt_encoder.",
    "mask_decoder.",
    "sam_prompt_encoder.",
    "sam_mask_decoder.",
    "no_mem_embed",
)
"""What the names of the weights that an image alone needs begin with."""


def original_sam2(name: str):
    """sam2's image predictor. Its sizes come from sam2's own configurations, but for those of the small ones."""
    import sam2  # noqa: F401 - initialises hydra
    from hydra import compose
    from hydra.utils import instantiate
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    config, trunk = SAM2[name], "++model.image_encoder.trunk"
    letter, _, side = name.partition("-")
    chosen = [f"++model.image_size={config.image_side}"]
    if not side:
        dims = [config.encoder_dim << stage for stage in (3, 2, 1, 0)]
        chosen += [
            f"{trunk}.embed_dim={config.encoder_dim}",
            f"{trunk}.num_heads={config.encoder_heads}",
            f"{trunk}.stages={list(config.blocks)}",
            f"{trunk}.global_att_blocks={list(config.global_layers)}",
            f"{trunk}.window_spec={list(config.windows)}",
            f"{trunk}.window_pos_embed_bkg_spatial_size={[config.background] * 2}",
            f"++model.image_encoder.neck.backbone_channel_list={dims}",
        ]
    composed = compose(f"configs/sam2.1/sam2.1_hiera_{letter if side else 't'}.yaml", overrides=chosen)
    predictor = SAM2ImagePredictor(named(instantiate(composed.model, _recursive_=True)))
    # The predictor has the sizes of levels at 1024 px written into it.
    predictor._bb_feat_sizes = [(config.image_side // level,) * 2 for level in (4, 8, 16)]
    return predictor


def original_sam_med2d(name: str):
    """SAM-Med2D's predictor, of modules with the sizes of `build_sam_vit_b`."""
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
    from segment_anything.modeling.sam_model import Sam
    from segment_anything.predictor_sammed import SammedPredictor

    config = SAM_MED2D[name]
    encoder = ImageEncoderViT(
        depth=config.encoder_depth,
        embed_dim=config.encoder_dim,
        img_size=config.image_side,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=config.encoder_heads,
        patch_size=config.patch,
        use_rel_pos=True,
        global_attn_indexes=config.global_layers,
        window_size=config.window,
        out_chans=config.prompt_dim,
        adapter_train=True,
    )
    prompts = PromptEncoder(
        embed_dim=config.prompt_dim,
        image_embedding_size=(config.grid, config.grid),
        input_image_size=(config.image_side, config.image_side),
        mask_in_chans=16,
    )
    transformer = TwoWayTransformer(
        depth=2,
        embedding_dim=config.prompt_dim,
        mlp_dim=config.decoder_mlp_dim,
        num_heads=config.decoder_heads,
    )
    decoder = MaskDecoder(
        num_multimask_outputs=config.multimask_outputs,
        transformer=transformer,
        transformer_dim=config.prompt_dim,
        iou_head_hidden_dim=config.prompt_dim,
    )
    return SammedPredictor(named(Sam(encoder, prompts, decoder)))


def named(model):
    """With the weights that its names make."""
    state = {name: torch.from_numpy(weight(name, tuple(old.shape))) for name, old in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def answers(predictor, model) -> dict[str, np.ndarray]:
    shapes = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    of_image = {name: shape for name, shape in shapes.items() if name.startswith(OF_IMAGE)}
    found = {
        "shapes": np.array(checkpoint_digest(of_image)),
        "beside": np.array(sorted(shapes.keys() - of_image.keys()), dtype=str),
    }
    predictor.set_image(IMAGE)
    logits = []
    for kind in (*PROMPTS, "refined"):
        given = PROMPTS["both" if kind == "refined" else kind]
        masks = logits if kind == "refined" else [None] * 2
        parts = [predicted(predictor, given, i, masks[i]) for i in range(2)]
        scores, logits, drawn = (np.stack(column) for column in zip(*parts, strict=True))
        kept = STRIDE if logits.shape[-1] > LOGITS else 1
        found |= {
            f"{kind}_scores": scores,
            f"{kind}_logits": logits[:, ::kept, ::kept],
            f"{kind}_masks": np.packbits(drawn, axis=-1),
        }
    return found


def predicted(predictor, given, i: int, mask):
    """Scores [m], and of the highest the logits [h, w] and the mask [H, W]."""
    masks, scores, logits = predictor.predict(
        point_coords=given["points"][i] if "points" in given else None,
        point_labels=given["labels"][i] if "labels" in given else None,
        box=given["boxes"][i] if "boxes" in given else None,
        mask_input=None if mask is None else mask[None],
        multimask_output=True,
    )
    best = int(scores.argmax())
    return scores, logits[best], masks[best] > 0


@torch.no_grad()
def main(package: str) -> None:
    cases, original = {"sam2": (SAM2, original_sam2), "sam_med2d": (SAM_MED2D, original_sam_med2d)}[package]
    OUTPUTS.mkdir(exist_ok=True)
    for name in cases:
        predictor = original(name)
        np.savez_compressed(OUTPUTS / f"{package}-{name}.npz", **answers(predictor, predictor.model))


if __name__ == "__main__":
    main(sys.argv[1])
