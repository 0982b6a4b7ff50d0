"""The baselines against slow, plain computations of the papers' formulae; and what they lack, they say in one line."""

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import opensan
from opensan.assemble.scores import score_maps
from opensan.errors import UserError
from opensan.evaluation.cost import count_baseline, count_parameters
from opensan.images import prepare
from opensan.segmenters.baselines import METHODS, parse_baseline
from opensan.segmenters.baselines.build import build_baseline
from opensan.segmenters.baselines.mask_tokens import RelativeMaskAttention, embed_masks
from opensan.segmenters.baselines.options import MaskTokenOptions
from opensan.vocabulary import Vocabulary

from .encoders import small_san
from .test_serve import refused, serving

WORDS = ["red star", "grass", "sky|night sky", "wood"]


def noise(height: int = 70, width: int = 100, seed: int = 0) -> np.ndarray:
    smooth = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC))


def baseline_of(source: str, model, **settings):
    return build_baseline(parse_baseline(f"{source}:small"), model, text_cache=False, **settings)


def network_image(model, image: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(prepare(image, model.config.image).pixels)


def text_rows(segmenter) -> list[torch.Tensor]:
    """The unit rows of each word."""
    vocabulary = Vocabulary.parse(WORDS)
    text = segmenter.text.classifier(vocabulary)
    return [text.rows[text.row_class == number] for number in range(len(WORDS))]


def logits_of(model, embedding: torch.Tensor, rows: list[torch.Tensor]) -> torch.Tensor:
    """The factor times the cosine of the best synonym, word by word."""
    factor = model.clip.logit_scale.exp()
    return torch.stack([max(factor * (embedding @ row) for row in of_word) for of_word in rows])


def plain_tokens(model, pixels: torch.Tensor, blocks: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """CLIP's tokens [1 + L, C] after so many blocks, by torch's own modules."""
    visual = model.clip.visual
    patches = F.conv2d(pixels.unsqueeze(0), visual.conv1.weight, stride=visual.conv1.kernel_size)
    grid = tuple(patches.shape[2:])
    table = visual.positional_embedding
    side = round((len(table) - 1) ** 0.5)
    resized = table[1:].T.reshape(1, -1, side, side)
    if grid != (side, side):
        resized = F.interpolate(resized, size=grid, mode="bicubic", align_corners=False)
    tokens = torch.cat([(visual.class_embedding + table[0]).view(1, -1, 1), (patches + resized).flatten(2)], dim=2)
    x = visual.ln_pre(tokens[0].T)
    for block in itertools.islice(visual.transformer.resblocks, blocks):
        normed = block.ln_1(x).unsqueeze(0)
        x = x + block.attn(normed, normed, normed, need_weights=False)[0][0]
        x = x + block.mlp(block.ln_2(x))
    return x, grid


@torch.no_grad()
def plain_dense(model, pixels: torch.Tensor, *, plain: bool) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """Position by position: unit embeddings [L, D] and keys [L, C]."""
    visual = model.clip.visual
    tokens, grid = plain_tokens(model, pixels, len(visual.transformer.resblocks) - 1)
    last = visual.transformer.resblocks[-1]
    width = tokens.shape[1]
    embeddings, keys = [], []
    for x in tokens[1:]:
        projected = last.attn.in_proj_weight @ last.ln_1(x) + last.attn.in_proj_bias
        keys.append(projected[width : 2 * width])
        y = last.attn.out_proj(projected[2 * width :])
        if not plain:
            y = x + y
            y = y + last.mlp(last.ln_2(y))
        out = visual.ln_post(y) @ visual.proj
        embeddings.append(out / out.norm())
    return torch.stack(embeddings), torch.stack(keys), grid


@pytest.mark.parametrize("plain", [False, True])
def test_dense_embeddings_are_the_last_block_without_its_attention(small_model, plain):
    segmenter = baseline_of("maskclip,plain" if plain else "maskclip", small_model)
    image = noise()
    encoding = segmenter.encode(image)
    expected, _, grid = plain_dense(small_model, network_image(small_model, image), plain=plain)
    found = encoding["dense_embeddings"]
    assert tuple(found.shape[:2]) == grid and grid[0] > 8 != grid[1], "the position table is resized"
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=2e-5, rtol=1e-4)
    other = baseline_of("maskclip" if plain else "maskclip,plain", small_model).encode(image)
    assert (other["dense_embeddings"] - found).abs().max() > 0.01


def test_dense_scores_are_cosines_resized(small_model):
    """The labels are the best words of logits that are resized as SAN's masks are."""
    segmenter = baseline_of("maskclip", small_model)
    image = noise()
    segmentation = segmenter.segment(image, WORDS)
    embeddings, _, grid = plain_dense(small_model, network_image(small_model, image), plain=False)
    maps = torch.stack([logits_of(small_model, one, text_rows(segmenter)) for one in embeddings]).T.reshape(-1, *grid)
    sizes = segmentation.encoding.sizes
    resized = F.interpolate(maps[None], size=sizes.padded, mode="bilinear", align_corners=False)
    cropped = resized[:, :, : sizes.network[0], : sizes.network[1]]
    scores = F.interpolate(cropped, size=sizes.image, mode="bilinear", align_corners=False)[0].softmax(0).numpy()
    np.testing.assert_allclose(segmentation.confidence, scores.max(0), atol=1e-4)
    assert (segmentation.labels == scores.argmax(0)).mean() > 0.999
    assert len(np.unique(segmentation.labels)) > 1


def test_denoising_and_smoothing(small_model):
    image = noise()
    embeddings, keys, grid = plain_dense(small_model, network_image(small_model, image), plain=False)
    rows = text_rows(baseline_of("maskclip", small_model))
    probabilities = torch.stack([logits_of(small_model, one, rows) for one in embeddings]).softmax(1)
    limit = float(probabilities.amax(0).sort().values[1:3].mean())  # two words never reach it
    denoised = baseline_of(f"maskclip,denoise={limit}", small_model).segment(image, WORDS)
    kept = {index for index in range(len(WORDS)) if probabilities[:, index].max() >= limit}
    assert len(kept) == 2 and set(np.unique(denoised.labels)) <= kept
    assert (denoised.labels != baseline_of("maskclip", small_model).segment(image, WORDS).labels).any()

    threshold = float(probabilities.amax(1).median())
    segmenter = baseline_of(f"maskclip,smooth={threshold}", small_model)
    expected = probabilities.clone()
    for number, own in enumerate(probabilities):
        if own.max() < threshold:
            weights = torch.stack([F.cosine_similarity(keys[number], other, dim=0) for other in keys])
            mean = sum(weight * other for weight, other in zip(weights, probabilities, strict=True))
            expected[number] = mean / weights.abs().sum()
    encoding = segmenter.encode(image)
    from opensan.segmenters.baselines.dense import word_maps

    text = segmenter.text.classifier(Vocabulary.parse(WORDS))
    with torch.no_grad():
        found, probable = word_maps(
            small_model, encoding["dense_embeddings"], encoding["keys"], text, segmenter.options
        )
    assert probable
    torch.testing.assert_close(found, expected.T.reshape(-1, *grid), atol=1e-4, rtol=1e-3)


def test_no_word_is_dropped_where_none_is_likely(small_model):
    image = noise()
    plain, denoised = (baseline_of(source, small_model) for source in ("maskclip", "maskclip,denoise=1"))
    np.testing.assert_array_equal(plain.segment(image, WORDS).labels, denoised.segment(image, WORDS).labels)


@torch.no_grad()
def plain_two_stage(model, segmenter, image: np.ndarray, trained: set[int], weight: float) -> torch.Tensor:
    """Class probabilities [Q, K], proposal by proposal."""
    encoding = segmenter.encode(image)
    sizes, pixels = encoding.sizes, network_image(model, image)
    rows = text_rows(segmenter)
    null = model.no_object_embedding / model.no_object_embedding.norm()
    side = model.config.clip.vision.image_size
    answers = []
    for logits, embedding in zip(encoding["mask_logits"], encoding["mask_embeddings"], strict=True):
        full = F.interpolate(logits[None, None], size=sizes.padded, mode="bilinear", align_corners=False)[0, 0]
        mask = full[: sizes.network[0], : sizes.network[1]].sigmoid() > 0.5
        scores = logits_of(model, embedding, [*rows, null])
        p_mask = scores.softmax(0)[:-1]
        p_clip = torch.ones(len(rows))
        if mask.any():
            ys, xs = np.nonzero(mask.numpy())
            filled = pixels[:, : sizes.network[0], : sizes.network[1]].clone()
            filled[:, ~mask] = 0
            box = filled[None, :, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            picture = F.interpolate(box, size=(side, side), mode="bicubic", align_corners=False)[0]
            tokens, _ = plain_tokens(model, picture, len(model.clip.visual.transformer.resblocks))
            out = model.clip.visual.ln_post(tokens[0]) @ model.clip.visual.proj
            p_clip = logits_of(model, out / out.norm(), rows).softmax(0)
        own = [
            p_mask[k] ** weight * p_clip[k] ** (1 - weight)
            if k in trained
            else p_mask[k] ** (1 - weight) * p_clip[k] ** weight
            for k in range(len(rows))
        ]
        answers.append(torch.stack(own))
    return torch.stack(answers)


def test_two_stage_is_the_ensemble_of_proposals_and_crops(small_model, tmp_path):
    """The third proposal is empty: CLIP says nothing of it."""
    (tmp_path / "trained.txt").write_text("Red star\nnight sky\n")
    segmenter = baseline_of(f"two-stage,trained={tmp_path / 'trained.txt'}", small_model)
    through = segmenter._propose

    def with_an_empty_mask(pixels):
        proposals = through(pixels)
        proposals.mask_logits[:, 2] = -5
        return proposals

    segmenter._propose = with_an_empty_mask
    image = noise()
    encoding = segmenter.encode(image)
    assert not encoding["crop_embeddings"][2].any() and encoding["crop_embeddings"][[0, 1, 3]].any(dim=1).all()
    expected = plain_two_stage(small_model, segmenter, image, {0, 2}, 0.8)
    found = segmenter.class_probabilities(encoding, Vocabulary.parse(WORDS))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-3)
    scores = score_maps(encoding["mask_logits"], expected, encoding.sizes)
    assert (segmenter.segment(encoding, WORDS).labels == scores.argmax(0).numpy()).mean() > 0.995


def test_the_kinds_of_words_and_the_weight_matter(small_model, tmp_path):
    (tmp_path / "trained.txt").write_text("red star\n")
    image, vocabulary = noise(), Vocabulary.parse(WORDS)
    sources = ("two-stage", f"two-stage,trained={tmp_path / 'trained.txt'}", "two-stage,weight=0.6")
    kinds = [baseline_of(source, small_model) for source in sources]
    first, second, third = (one.class_probabilities(one.encode(image), vocabulary) for one in kinds)
    assert (first[:, 0] != second[:, 0]).any() and torch.equal(first[:, 1:], second[:, 1:])
    assert (first != third).any()


@torch.no_grad()
def plain_mask_tokens(model, pixels, mask_logits, relative=None) -> torch.Tensor:
    """All of CLIP on [mask tokens, class token, patches] with one attention mask [Q + 1 + L, Q + 1 + L]."""
    scale = model.config.clip_scale
    small = F.interpolate(pixels[None], scale_factor=scale, mode="bilinear", align_corners=False)[0]
    tokens, grid = plain_tokens(model, small, 0)
    queries, heads = len(mask_logits), model.clip.attention_heads
    inside = F.adaptive_max_pool2d((mask_logits.sigmoid() >= 0.5).float()[None], grid)[0].flatten(1)
    x = torch.cat([tokens[:1].expand(queries, -1), tokens])
    length = len(x)
    for number, block in enumerate(model.clip.visual.transformer.resblocks, start=1):
        mask = torch.zeros(heads, length, length)
        mask[:, :, :queries] = -torch.inf
        mask[:, :queries, queries + 1 :].masked_fill_(inside[None] == 0, -torch.inf)
        if relative is not None and str(number) in relative.maps:
            whole = [side * model.config.clip.vision.patch_size for side in grid]
            full = F.interpolate(mask_logits[None], size=whole, mode="bilinear", align_corners=False)[0].tanh()
            mapped = relative.maps[str(number)](x[queries + 1 :])
            for query in range(queries):
                own = relative.norm(relative.embedding(full[query][None, None]).flatten(2)[0].T)
                for head, (a, b) in enumerate(zip(mapped.chunk(heads, 1), own.chunk(heads, 1), strict=True)):
                    mask[head, query, queries + 1 :] += (a * b).sum(1)
        normed = block.ln_1(x).unsqueeze(0)
        x = x + block.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0][0]
        x = x + block.mlp(block.ln_2(x))
    out = model.clip.visual.ln_post(x[:queries]) @ model.clip.visual.proj
    return out / out.norm(dim=1, keepdim=True)


def relative_attention(model, blocks=(2, 5)) -> RelativeMaskAttention:
    vision = model.config.clip.vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        relative = RelativeMaskAttention(vision.width, vision.heads, vision.patch_size, blocks)
        for layer in relative.maps.values():
            torch.nn.init.normal_(layer.weight, std=0.2)
    return relative


@pytest.mark.parametrize("with_relative", [False, True])
def test_mask_tokens_see_the_class_token_and_their_mask(small_model, with_relative):
    relative = relative_attention(small_model) if with_relative else None
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 96, 128, generator=generator)
    masks = torch.randn(4, 6, 8, generator=generator)
    masks[1] = -1  # nothing: the class token alone is seen
    with torch.no_grad():
        found = embed_masks(small_model, pixels[None], masks[None], MaskTokenOptions(), relative)[0]
    torch.testing.assert_close(found, plain_mask_tokens(small_model, pixels, masks, relative), atol=2e-5, rtol=1e-4)
    if with_relative:
        with torch.no_grad():
            without = embed_masks(small_model, pixels[None], masks[None], MaskTokenOptions())[0]
        assert (found - without)[[0, 2, 3]].abs().max() > 1e-3


def test_relative_mask_attention_is_read_from_a_file(small_model, tmp_path):
    path = tmp_path / "relative.safetensors"
    save_file(relative_attention(small_model).state_dict(), path)
    plain, with_it = (baseline_of(source, small_model) for source in ("mask-tokens", f"mask-tokens,relative={path}"))
    image = noise()
    assert (plain.encode(image)["mask_embeddings"] != with_it.encode(image)["mask_embeddings"]).any()
    assert plain.identity.image != with_it.identity.image
    path.write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"mask-tokens: relative=.*not a readable safetensors file"):
        baseline_of(f"mask-tokens,relative={path}", small_model)
    save_file({"embedding.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"mask-tokens: relative=.*does not fit this CLIP"):
        baseline_of(f"mask-tokens,relative={path}", small_model)


def test_mask_tokens_have_no_null(small_model):
    segmenter = baseline_of("mask-tokens", small_model)
    probabilities = segmenter.class_probabilities(segmenter.encode(noise()), Vocabulary.parse(WORDS))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(probabilities)))


SOURCES = (
    *("maskclip", "maskclip,plain", "maskclip,denoise", "maskclip,smooth", "maskclip,scale=0.5"),
    *("two-stage", "two-stage,weight=0.7", "two-stage,trained=voc20", "two-stage,side=32"),
    *("mask-tokens", "mask-tokens,scale=1"),
)


def test_identities_differ_and_no_method_takes_anothers_encodings(small_model):
    segmenters = [baseline_of(source.replace("voc20", "pascal_voc_20"), small_model) for source in SOURCES]
    identities = [segmenter.identity.image for segmenter in segmenters]
    own = opensan.SanSegmenter(small_model, text_cache=False).identity
    assert len({*identities, own.image}) == len(SOURCES) + 1
    assert {segmenter.identity.text for segmenter in segmenters} == {own.text}
    with pytest.raises(UserError, match="was made by model two-stage-small"):
        segmenters[0].segment(segmenters[5].encode(noise()), WORDS)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("maskclip,residual:tiny", "maskclip: residual: no such key"),
        ("maskclip,denoise=2:tiny", "maskclip: denoise: Input should be less than or equal to 1"),
        ("two-stage,trained=nowhere.txt:tiny", "two-stage: trained=nowhere.txt: no such file, nor one of ade20k_150"),
        ("maskclip,plain:photo", "plain is about the last block of a ViT, and photo has none"),
        ("mask-tokens:photo", "mask-tokens: the method adds class tokens to a plain ViT"),
        ("maskclip:tyni", "no model 'tyni'"),
    ],
)
def test_what_cannot_be_had_is_one_line(source, problem):
    with pytest.raises(UserError, match=problem) as caught:
        opensan.load(source)
    assert "\n" not in str(caught.value)


def test_a_baseline_is_exact():
    with pytest.raises(UserError, match="maskclip computes in float32 alone"):
        opensan.load("maskclip:tiny", speed="fast")


@pytest.mark.parametrize("name", ["clip_resnet", "convnext", "align", "efficientnet_lite"])
def test_dense_labels_by_other_backbones(name):
    """A position is embedded as an image of which the pooling sees that position alone."""
    model = small_san(name)
    image = noise(96, 96)
    found = baseline_of("maskclip", model).encode(image)["dense_embeddings"]
    features = model.clip.shallow_features(network_image(model, image)[None], model.config.recognition_layer, ())
    position = features.tokens[0, 4]
    if name == "clip_resnet":
        pool = model.clip.visual.attnpool
        expected = F.normalize(pool.c_proj(pool.v_proj(position)), dim=-1)
    else:
        alone = replace(features, tokens=position.expand(1, 1, -1), grid=(1, 1))
        expected = model.clip.recognise(alone, torch.zeros(1, 1, 1, 1, 1))[0, 0]
    torch.testing.assert_close(found.flatten(0, 1)[4], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["siglip", "eva"])
def test_backbones_without_a_dense_form_are_refused(name):
    with pytest.raises(UserError, match=r"maskclip: .* has a backbone of .*, whose last layer cannot be read"):
        baseline_of("maskclip", small_san(name))


def test_the_dense_method_cannot_explain(small_model):
    buffer = io.BytesIO()
    Image.fromarray(noise()).save(buffer, "PNG")
    with serving(baseline_of("maskclip", small_model)) as running:
        answer = running.client.post("/v1/encodings", content=buffer.getvalue(), headers={"Content-Type": "image/png"})
        point = running.client.post(f"{answer.headers['Location']}/point", json={"words": WORDS, "x": 3, "y": 5})
        refused(point, 422, "an explanation of a pixel needs a model with mask proposals, and maskclip-small has none")


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_take_a_baseline(method, model_folder, tmp_path, run):
    Image.fromarray(noise()).save(tmp_path / "image.png")
    model = f"{method}:{model_folder}"
    code, _, err = run("segment", tmp_path / "image.png", "--words", "red,blue", "--model", model, "-o", tmp_path / "o")
    assert code == 0, err
    assert json.loads((tmp_path / "o" / "image.segments.json").read_text())["model"].startswith(f"{method}-small-")
    folder = tmp_path / "set"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(noise()).save(folder / "images" / "a.png")
    Image.fromarray(np.zeros((70, 100), np.uint8)).save(folder / "labels" / "a.png")
    (folder / "classes.txt").write_text("red\nblue\n")
    (folder / "val.txt").write_text("a\n")
    code, out, err = run("eval", "--data", folder, "--model", model, "-o", tmp_path / "results", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["images"] == 1
    code, out, err = run("profile", model, "--size", "64x64", "--words", "3", "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == f"{method}:small"


def test_costs_are_counted_by_stage(small_config, small_model):
    """Ten crops cost ten times one; what CLIP does for mask tokens grows with the queries; maskclip trains nothing."""
    size, words = (96, 128), 5

    def count(source: str, config=small_config) -> dict[str, int]:
        return count_baseline(parse_baseline(f"{source}:small"), config, size, words)

    crops = count("two-stage")["CLIP, 10 crops of 64x64"]
    c, tokens, layers = 32, 64 + 1, small_config.clip.vision.layers
    deep, one = layers - small_config.recognition_layer - 1, 12 * c**2
    attention = 2 * tokens**2 * c
    shallow = small_config.recognition_layer * (tokens * one + attention) + 64 * 3 * 8**2 * c
    steered = 2 * 64 * c  # one query on the patches; it sees itself by a sum that is no matrix product
    last = 10 * c**2 + 2 * (tokens + 1) * c**2 + steered
    expected = shallow + deep * ((tokens + 1) * one + attention + steered) + last + c * 24
    assert crops == 10 * expected
    fewer = small_config.model_copy(
        update={"side_adapter": small_config.side_adapter.model_copy(update={"queries": 5})}
    )
    assert count("mask-tokens", fewer)["CLIP, mask tokens"] < count("mask-tokens")["CLIP, mask tokens"]
    assert count("maskclip,plain")["CLIP, dense"] < count("maskclip")["CLIP, dense"]
    assert count_parameters(small_model, parse_baseline("maskclip:small"))["all"].trained == 0
    both = [count_parameters(small_model, parse_baseline(f"{name}:small")) for name in ("two-stage", "mask-tokens")]
    table = small_model.clip.visual.positional_embedding.numel()
    assert all(own["all"].trained == count_parameters(small_model)["all"].trained - table for own in both)
