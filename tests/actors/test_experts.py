"""Segmentation experts: equal to segment-anything's own predictor, strict about prompts and checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from segment_anything import SamPredictor
from segment_anything.utils.transforms import ResizeLongestSide

from actors.experts import two_way
from actors.experts.protocol import Decoded, Embedding, NotFinite, Prompts
from actors.experts.published import PUBLISHED_EXPERTS
from actors.experts.registry import FAMILIES, licence, licence_line, load_expert
from actors.experts.sam import SamExpert, build_sam, content_size
from actors.experts.sam2 import Sam2Expert
from actors.experts.sam_config import VIT_B, SamConfig, config_json
from actors.experts.weights import save_weights, shapes_of
from bench.expert_shapes import SMALL as EXPERT_SHAPES
from bench.expert_shapes import random_expert
from umrg.frames import Size, rescale

pytestmark = pytest.mark.numeric

SMALL = SamConfig(
    image_side=64, patch=8, window=4, encoder_dim=16, encoder_depth=2, encoder_heads=2, global_layers=(1,),
    prompt_dim=16, decoder_heads=2, decoder_mlp_dim=16,
)  # fmt: skip
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
BOXES = np.array([[10.0, 5.0, 40.0, 30.0], [0.0, 0.0, 79.0, 47.0], [50.5, 20.25, 70.0, 44.0]])
POINTS = np.array([[[20.0, 10.0], [30.0, 25.0]], [[1.0, 1.0], [70.0, 40.0]], [[60.0, 30.0], [61.5, 35.0]]])
PROMPTS = {
    "boxes": {"boxes": BOXES},
    "points": {"points": POINTS},
    "both": {"boxes": BOXES, "points": POINTS},
}


def small_expert(**settings: object) -> SamExpert:
    torch.manual_seed(0)
    return SamExpert(build_sam(SMALL), SMALL, name="small", **settings)  # type: ignore[arg-type]


def decode(expert: SamExpert, embedding: Embedding, prompts: dict[str, NDArray[np.float64]]) -> Decoded:
    return expert.decode(embedding, boxes=prompts.get("boxes"), points=prompts.get("points"))


def best_of_predictor(predictor: SamPredictor, prompts: dict[str, NDArray[np.float64]], i: int) -> Decoded:
    """The predictor's mask of highest score for prompt i, as one would use it by hand."""
    points = prompts["points"][i] if "points" in prompts else None
    masks, scores, logits = predictor.predict(
        point_coords=points,
        point_labels=None if points is None else np.ones(len(points)),
        box=prompts["boxes"][i] if "boxes" in prompts else None,
        multimask_output=True,
    )
    best = int(scores.argmax())
    return Decoded(drawn=torch.from_numpy(masks[best]), scores=scores[best], logits=logits[best])


@pytest.mark.slow
def test_sam_vit_b_equals_sam_predictor_batched_and_one_at_a_time() -> None:
    torch.manual_seed(0)
    sam = build_sam(VIT_B)
    expert, predictor = SamExpert(sam, VIT_B, name="sam_vit_b"), SamPredictor(sam)
    predictor.set_image(IMAGE)
    embedding = expert.embed(IMAGE)
    for prompts in PROMPTS.values():
        batched = decode(expert, embedding, prompts)
        for i in range(len(BOXES)):
            theirs = best_of_predictor(predictor, prompts, i)
            alone = decode(expert, embedding, {kind: values[i : i + 1] for kind, values in prompts.items()})
            for logits, scores, masks in (
                (batched.logits[i], batched.scores[i], batched.masks[i]),
                (alone.logits[0], alone.scores[0], alone.masks[0]),
            ):
                np.testing.assert_allclose(logits, theirs.logits, atol=1e-4)
                np.testing.assert_allclose(scores, theirs.scores, atol=1e-4)
                assert np.mean(masks != theirs.masks) < 1e-3  # a logit of 1e-6 may fall on either side
        assert np.ptp(batched.logits) > 0.01


def test_labelled_points_are_those_of_sam_predictor() -> None:
    torch.manual_seed(0)
    sam = build_sam(SMALL)
    expert, predictor = SamExpert(sam, SMALL, name="small"), SamPredictor(sam)
    predictor.set_image(IMAGE)
    embedding = expert.embed(IMAGE)
    labels = np.array([[1, 0], [0, 1], [0, 0]])
    for boxes in (None, BOXES):
        ours = expert.decode(embedding, boxes=boxes, points=POINTS, labels=labels)
        for i in range(3):
            masks, scores, logits = predictor.predict(POINTS[i], labels[i], box=None if boxes is None else boxes[i])
            best = int(scores.argmax())
            np.testing.assert_allclose(ours.logits[i], logits[best], atol=1e-4)
            np.testing.assert_allclose(ours.scores[i], scores[best], atol=1e-4)
            assert np.mean(ours.masks[i] != masks[best]) < 1e-2  # a logit of 1e-6 may fall on either side
        unlabelled = expert.decode(embedding, boxes=boxes, points=POINTS)
        assert np.abs(ours.logits - unlabelled.logits).max() > 1e-3
        foreground = expert.decode(embedding, boxes=boxes, points=POINTS, labels=np.ones((3, 2), dtype=np.int64))
        assert np.array_equal(foreground.logits, unlabelled.logits)


@pytest.mark.parametrize(
    ("points", "labels", "message"),
    [
        (POINTS, np.ones((3, 1), dtype=np.int64), r"labels \[3, 1\] of points \[3, 2, 2\]"),
        (POINTS, np.full((3, 2), 2), "1 for foreground or 0"),
        (None, np.ones((3, 2), dtype=np.int64), "labels are of points"),
    ],
)
def test_labels_that_are_none_say_what_is_wrong(
    points: NDArray[np.float64] | None, labels: NDArray[np.int64], message: str
) -> None:
    expert = small_expert()
    with pytest.raises(ValueError, match=message):
        expert.decode(expert.embed(IMAGE), boxes=BOXES, points=points, labels=labels)


class Together(SamExpert):
    """Embeds as on a GPU."""

    @property
    def images_at_once(self) -> int:
        return 4


@pytest.mark.parametrize("preprocess", ["published", "native"])
def test_images_are_embedded_together_in_few_shapes_as_alone(preprocess: str) -> None:
    torch.manual_seed(0)
    sam = build_sam(SMALL)
    passes: list[int] = []
    sam.image_encoder.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    expert = Together(sam, SMALL, name="small", preprocess=preprocess)  # type: ignore[arg-type]
    images = [np.roll(IMAGE, i, axis=1)[: 48 - i] for i in range(7)]
    embeddings = expert.embed_all(images)
    assert passes == [4, 4]  # the second has three images and one of padding
    for image, together in zip(images, embeddings, strict=True):
        alone = expert.embed(image)
        torch.testing.assert_close(together.features[0], alone.features[0], atol=1e-4, rtol=0)
        assert (together.original, together.content) == (alone.original, alone.content)
        assert together.features[0].untyped_storage().nbytes() == together.nbytes
    assert passes[2:] == [1] * 7


def test_a_cpu_embeds_images_one_by_one_as_training_does() -> None:
    expert = small_expert()
    together, alone = expert.embed_all([IMAGE, IMAGE[:20]]), [expert.embed(IMAGE), expert.embed(IMAGE[:20])]
    assert all(torch.equal(ours.features[0], each.features[0]) for ours, each in zip(together, alone, strict=True))
    assert expert.embed_all([]) == []
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        expert.embed_all([IMAGE, IMAGE[:, :, 0]])


def test_masks_of_large_images_are_scaled_up_few_at_a_time_and_stay_the_same() -> None:
    expert = small_expert()
    large = np.zeros((3000, 4000, 3), dtype=np.uint8)
    embedding = expert.embed(large)
    boxes = BOXES * 20
    together = expert.decode(embedding, boxes=boxes)
    logits = torch.from_numpy(together.logits)[:, None]
    at_once = expert._sam.postprocess_masks(logits, (48, 64), (3000, 4000))[:, 0] > 0
    assert np.array_equal(together.masks, at_once.numpy())


def test_sizes_are_those_of_the_official_builders() -> None:
    from segment_anything import sam_model_registry

    for name in ("vit_b", "vit_l", "vit_h"):
        with torch.device("meta"):
            official = sam_model_registry[name]().state_dict()
            ours = FAMILIES["sam"].build(PUBLISHED_EXPERTS[f"sam_{name}"].config).state_dict()
        assert shapes_of(ours) == shapes_of(official)


def test_decoded_arrays_are_in_original_pixels_and_on_the_experts_grid() -> None:
    expert = small_expert()
    decoded = expert.decode(expert.embed(IMAGE), boxes=BOXES, points=POINTS)
    assert (*decoded.masks.shape, str(decoded.masks.dtype)) == (3, 48, 80, "bool")
    assert (*decoded.scores.shape, str(decoded.scores.dtype)) == (3, "float32")
    assert (*decoded.logits.shape, str(decoded.logits.dtype)) == (3, 32, 32, "float32")


@pytest.mark.parametrize("rows", [None, 4])
def test_a_requests_masks_are_the_same_bits_whatever_is_decoded_beside_it(rows: int | None) -> None:
    """With passes as on a CPU, and with those of a GPU, which hold prompts of several images."""
    expert = small_expert(rows=rows)
    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8) for i in range(3)]
    boxes = np.tile(BOXES, (4, 1)) + generator.uniform(0, 5, (12, 4))
    requests = [
        Prompts(embedding=expert.embed(image), boxes=boxes[:count], points=points)
        for image, count, points in zip(images, (11, 1, 5), (None, None, np.tile(POINTS, (2, 1, 1))[:5]), strict=True)
    ]
    together = expert.decode_all(requests)
    for order in ([2, 0, 1], [1], [0, 1]):
        for i, decoded in zip(order, expert.decode_all([requests[i] for i in order]), strict=True):
            assert np.array_equal(decoded.logits, together[i].logits)
            assert np.array_equal(decoded.scores, together[i].scores)
            assert torch.equal(decoded.drawn, together[i].drawn)


@pytest.mark.parametrize("kind", ["boxes", "points", "both"])
def test_prompts_of_several_images_are_decoded_as_those_of_one(kind: str) -> None:
    """Which takes another way through the decoder."""
    one, several = small_expert(), small_expert(rows=8)
    first, second = one.embed(IMAGE), one.embed(IMAGE[:, ::-1].copy())
    prompts = PROMPTS[kind]
    expected = [decode(one, embedding, prompts) for embedding in (first, second)]
    found = several.decode_all([Prompts(embedding=embedding, **prompts) for embedding in (first, second)])
    for theirs, ours in zip(expected, found, strict=True):
        np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-4)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)


def test_a_mask_as_prompt_is_what_sam_predictor_makes_of_it() -> None:
    expert = small_expert()
    embedding = expert.embed(IMAGE)
    before = expert.decode(embedding, boxes=BOXES)
    refined = expert.decode(embedding, boxes=BOXES, points=POINTS, masks=before.logits)
    predictor = SamPredictor(expert._sam)
    predictor.set_image(IMAGE)
    for i, box in enumerate(BOXES):
        _, scores, logits = predictor.predict(
            POINTS[i], np.ones(2), box=box, mask_input=before.logits[i][None], multimask_output=True
        )
        np.testing.assert_allclose(refined.logits[i], logits[scores.argmax()], atol=1e-4)
    assert np.abs(refined.logits - before.logits).max() > 1e-2
    for wrong in (before.logits[:2], before.logits[:, :16], np.full_like(before.logits, np.nan)):
        with pytest.raises(ValueError, match=r"finite logits as they were decoded before, here \[3, 32, 32\]"):
            expert.decode(embedding, boxes=BOXES, masks=wrong)


def test_float32_is_not_rounded_to_tf32_on_a_gpu() -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    small_expert()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("part", ["image_encoder.neck.0", "mask_decoder.iou_prediction_head.layers.0"])
def test_numbers_that_are_none_are_never_a_mask(part: str) -> None:
    expert = small_expert()
    expert._sam.get_submodule(part).weight.fill_(torch.nan)
    with pytest.raises(NotFinite, match=r"small computes numbers that are not finite in float32; set segmenter\.dtype"):
        expert.decode(expert.embed(IMAGE), boxes=BOXES)


@pytest.mark.parametrize(("height", "width"), [(1, 2000), (2000, 1), (1, 1), (2, 3)])
def test_an_image_may_be_a_line_or_a_point(height: int, width: int) -> None:
    expert = small_expert()
    embedding = expert.embed(np.full((height, width, 3), 200, dtype=np.uint8))
    decoded = expert.decode(embedding, boxes=np.array([[0.0, 0.0, width - 1.0, height - 1.0]]))
    assert decoded.masks.shape == (1, height, width)


def test_embeddings_of_other_classes_and_inputs_do_not_stand_for_each_other() -> None:
    """Not even where the weights are the same."""

    class Darker(SamExpert):
        def _pixels(self, image: NDArray[np.uint8]) -> torch.Tensor:
            return super()._pixels(image // 2)

    sam = build_sam(SMALL)
    sam2 = random_expert("small_hiera")
    assert isinstance(sam2, Sam2Expert)
    larger = Sam2Expert(sam2._sam2, sam2.config.model_copy(update={"image_side": 512}), name="larger")
    experts = (SamExpert(sam, SMALL, name="a"), Darker(sam, SMALL, name="a"), sam2, larger)
    found = [each.fingerprint() for each in experts]
    assert found[0] == SamExpert(sam, SMALL, name="b").fingerprint() and len(set(found)) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_encoder_gives_nearly_the_same_logits(dtype: str) -> None:
    exact, half = small_expert(), small_expert(dtype=dtype)
    expected, logits = (expert.decode(expert.embed(IMAGE), boxes=BOXES).logits for expert in (exact, half))
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.ptp(expected)


@pytest.mark.parametrize(
    ("boxes", "points", "message"),
    [
        (None, None, "give boxes, points, or both"),
        (BOXES[0], None, r"boxes are \[n, 4\]"),
        (None, POINTS[0], r"points are \[n, k, 2\]"),
        (None, POINTS[:, :0], "k at least 1"),
        (BOXES[:2], POINTS, "2 boxes, 3 points"),
        (np.full((1, 4), np.nan), None, "finite"),
    ],
)
def test_prompts_that_are_none_say_what_is_wrong(
    boxes: NDArray[np.float64] | None, points: NDArray[np.float64] | None, message: str
) -> None:
    expert = small_expert()
    with pytest.raises(ValueError, match=message):
        expert.decode(expert.embed(IMAGE), boxes=boxes, points=points)


def test_an_image_of_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        small_expert().embed(IMAGE[:, :, 0])


def test_native_medsam_fills_the_input_takes_boxes_only_and_ignores_brightness() -> None:
    expert = small_expert(preprocess="native")
    dark, bright = expert.embed(IMAGE // 4), expert.embed(IMAGE // 4 + 100)
    assert dark.content == Size(64, 64)
    torch.testing.assert_close(dark.features[0], bright.features[0])
    with pytest.raises(ValueError, match="boxes only"):
        expert.decode(dark, boxes=BOXES, points=POINTS)
    assert expert.decode(dark, boxes=BOXES).masks.shape == (3, 48, 80)


sides = st.integers(1, 4000)
steady = settings(deadline=None)


@steady
@given(width=sides, height=sides, side=st.sampled_from([224, 1024]), x=st.floats(0, 1), y=st.floats(0, 1))
def test_the_expert_frame_is_resize_longest_sides(width: int, height: int, side: int, x: float, y: float) -> None:
    original = Size(width, height)
    content = content_size(original, side)
    assert max(content.width, content.height) == side
    points = np.array([[x * (width - 1), y * (height - 1)]])
    scaled = rescale(points, original, content)
    assert (scaled >= 0).all() and scaled[0, 0] < content.width and scaled[0, 1] < content.height
    if min(width, height) * side >= max(width, height):  # else segment-anything has no image left
        np.testing.assert_allclose(scaled, ResizeLongestSide(side).apply_coords(points, (height, width)))


@steady
@given(width=sides, height=sides, factor=st.integers(2, 4), x=st.floats(0, 1), y=st.floats(0, 1))
def test_enlarging_image_and_prompt_together_changes_nothing(
    width: int, height: int, factor: int, x: float, y: float
) -> None:
    small, large = Size(width, height), Size(factor * width, factor * height)
    points = np.array([[x * width, y * height]])
    np.testing.assert_allclose(
        rescale(points, small, content_size(small, 1024)),
        rescale(factor * points, large, content_size(large, 1024)),
        atol=1e-9,
    )


def test_the_licence_of_an_experts_weights_is_stated_or_said_not_to_be(tmp_path: Path) -> None:
    assert licence("tiny") == "Apache-2.0 (MedReasoner)"
    assert licence("sam_vit_h") == "Apache-2.0 (Meta AI)"
    assert licence("medsam_vit_b") == "Apache-2.0 (bowang-lab MedSAM)"
    assert licence("medsam2") == "CC-BY-SA-4.0 (bowang-lab MedSAM2)"
    assert all(licence(name).startswith("Apache-2.0 (") for name in PUBLISHED_EXPERTS if name != "medsam2")
    assert licence_line("sam2.1_t") == "expert: sam2.1_t, licence of the weights: Apache-2.0 (Meta AI)"
    config = tmp_path / "config.json"
    config.write_text(config_json(SMALL))
    assert licence(str(tmp_path)) == "not stated"
    config.write_text(config_json(SMALL.model_copy(update={"licence": "CC-BY-4.0 (a hospital)"})))
    assert licence(str(tmp_path)) == "CC-BY-4.0 (a hospital)"


def test_a_converted_training_of_ones_own_has_not_the_official_files_licence(tmp_path: Path) -> None:
    official, own = tmp_path / "official.safetensors", tmp_path / "own.safetensors"
    for path, sha256 in ((official, "01ec64" + 58 * "0"), (own, 64 * "0")):
        save_weights({}, path, metadata={"name": "sam_vit_b", "source_sha256": sha256})
    assert licence(str(official)) == licence("sam_vit_b", official) == "Apache-2.0 (Meta AI)"
    assert licence(str(own)) == licence("sam_vit_b", own) == licence("tiny", own) == "not stated"
    save_weights({}, own, metadata={"name": "medsam2", "source_sha256": 64 * "0"})
    assert licence(str(own)) == "CC-BY-SA-4.0 (bowang-lab MedSAM2), if they are the official ones"


def test_what_is_asked_for_wrongly_is_answered_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nearest expert is 'medsam_vit_b'"):
        load_expert("medsam_vitb")
    with pytest.raises(ValueError, match=r"get sam_vit_h_4b8939\.pth .* --name sam_vit_h"):
        load_expert("sam_vit_h")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_expert(str(tmp_path))
    (tmp_path / "config.json").write_text(config_json(SMALL).replace("encoder_depth", "encoder_deep"))
    with pytest.raises(ValueError, match=r"config\.json: encoder_dep"):
        load_expert(str(tmp_path))
    with pytest.raises(ValueError, match=r"no checkpoint .*none\.safetensors"):
        load_expert("sam_vit_b", checkpoint=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="`native` is for medsam_vit_b"):
        load_expert("sam_vit_b", checkpoint=tmp_path / "none.safetensors", preprocess="native")
    with pytest.raises(ValueError, match="dtype is one of float32"):
        small_expert(dtype="int8")


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("shape", EXPERT_SHAPES)
def test_masks_are_the_same_in_whatever_blocks_they_are_made(
    shape: str, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = random_expert(shape, rows=rows)
    embedding = expert.embed(IMAGE)
    whole = expert.decode(embedding, boxes=BOXES, points=POINTS)
    monkeypatch.setattr(two_way, "_FINEST_ON_CPU", 1)
    split = expert.decode(embedding, boxes=BOXES, points=POINTS)
    assert np.abs(split.logits - whole.logits).max() < 1e-4 * np.ptp(whole.logits)
    assert np.array_equal(split.scores, whole.scores)
