"""The switches of the paper's ablations: each changes what it says and nothing else, and has an identity of its own."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from opensan.config import ModelConfig, parse_config
from opensan.errors import UserError
from opensan.evaluation.cost import count_multiply_adds, count_parameters
from opensan.model import build_san
from opensan.model.identity import model_identity
from opensan.train.optimizer import san_parameter_groups

PIXELS = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def variant(config: ModelConfig, **changes) -> ModelConfig:
    """The configuration with some keys changed, those of the side adapter by their own names; checked."""
    plain = config.model_dump()
    for key, value in changes.items():
        (plain["side_adapter"] if key in type(config.side_adapter).model_fields else plain)[key] = value
    return parse_config(ModelConfig, plain, "variant")


def lively(config: ModelConfig):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = build_san(config)
        for name, parameter in model.named_parameters():
            if name.startswith("side_adapter") and parameter.ndim > 1:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model


def like(config: ModelConfig, model, **changes):
    """A variant with the weights of `model`, as far as both have them."""
    other = lively(variant(config, **changes))
    shared = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in (own := other.state_dict()) and own[name].shape == tensor.shape
    }
    other.load_state_dict(shared, strict=False)
    return other


@pytest.fixture(scope="module")
def config(small_config):
    return small_config


@pytest.fixture(scope="module")
def model(config):
    return lively(config)


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def changed(one, other) -> set[str]:
    """The modules whose parameters are not in both, or have other shapes."""
    a, b = shapes(one), shapes(other)
    differing = {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
    return {name.partition(".weight")[0].partition(".bias")[0] for name in differing}


VARIANTS = {
    "no fusion": {"fusion": {}},
    "fusion at the input": {"fusion": {0: 0}},
    "fusion of one layer": {"fusion": {2: 3}},
    "gated": {"fusion_kind": "gated"},
    "cross-attention": {"fusion_kind": "cross-attention"},
    "shared head": {"head": "shared"},
    "one bias for all heads": {"bias_per_head": False},
    "a bias for each layer": {"bias_per_layer": True},
    "one bias for each layer": {"bias_per_head": False, "bias_per_layer": True},
    "cut": {"cut_gradient": True},
    "shared head, cut": {"head": "shared", "cut_gradient": True},
    "blocked": {"recognition": "blocked"},
    "pooling": {"recognition": "pooling"},
    "two-stage": {"recognition": "queries", "fusion": {}, "trained_clip": "none"},
    "own forward": {"recognition_scale": 1.0},
    "queries": {"queries": 5},
    "depth": {"depth": 3, "supervised_blocks": (2, 3)},
    "width": {"width": 24},
    "recognition layers": {"recognition_layer": 4},
    "scale": {"clip_scale": 1.0},
    "frozen": {"trained_clip": "none"},
    "whole": {"trained_clip": "whole"},
    "deep supervision": {"supervised_blocks": (4,)},
}


def test_identities_differ_between_all_variants(config):
    identities = [model_identity(lively(variant(config, **changes))) for changes in ({}, *VARIANTS.values())]
    assert len({one.image for one in identities}) == len(VARIANTS) + 1
    assert len({one.text for one in identities}) == 1


def test_a_model_without_switches_is_written_as_before(config):
    """Its identity and its file stay those of the version that had no switches."""
    plain = config.model_dump(mode="json")
    assert "recognition" not in plain and "trained_clip" not in plain and "head" not in plain["side_adapter"]
    other = variant(config, recognition="pooling", trained_clip="whole")
    assert other.model_dump(mode="json") == plain | {"recognition": "pooling", "trained_clip": "whole"}
    assert ModelConfig.model_validate_json(other.model_dump_json()) == other


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_proposes_learns_and_counts(name, config):
    model = lively(variant(config, **VARIANTS[name])).train()
    proposals = model.propose(PIXELS, supervise=True)
    queries = model.config.side_adapter.queries
    assert proposals.mask_logits.shape == (2, queries, 6, 8) and proposals.mask_embeddings.shape == (2, queries, 24)
    torch.testing.assert_close(proposals.mask_embeddings.norm(dim=2), torch.ones(2, queries))
    target = F.normalize(torch.ones(24), dim=0)
    (proposals.mask_logits.square().mean() + (proposals.mask_embeddings @ target).mean()).backward()
    idle = {entry.name for entry in model.trained() if entry.parameter.grad is None} - {"no_object_embedding"}
    if name == "two-stage":
        assert not idle
    assert not {one for one in idle if not one.startswith("clip.")}, "no part is idle"
    counts = count_multiply_adds(model.config, (96, 128), 3)
    assert sum(counts.values()) > 0 and all(count >= 0 for count in counts.values())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"fusion": {0: 0, 1: 1}}, {f"side_adapter.fusion.2.{part}" for part in ("channel_norm", "projection")}),
        ({"bias_per_head": False}, {"side_adapter.head.attention_mlp.layers.2"}),
        ({"bias_per_layer": True}, {"side_adapter.head.attention_mlp.layers.2"}),
        ({"head": "shared"}, {f"side_adapter.head.attention_mlp.layers.{layer}" for layer in range(3)}),
        ({"queries": 5}, {"side_adapter.query_embedding", "side_adapter.query_position"}),
        ({"cut_gradient": True}, set()),
        ({"recognition_scale": 1.0}, set()),
        ({"clip_scale": 1.0}, set()),
        ({"recognition_layer": 4}, set()),
        ({"trained_clip": "whole"}, set()),
        ({"supervised_blocks": (4,)}, set()),
    ],
)
def test_only_the_parts_that_a_switch_names_are_others(changes, parts, config, model):
    assert changed(model, like(config, model, **changes)) == parts


def unchanged(model, other, *, masks: bool) -> None:
    """Compare the masks, and demand that the embeddings differ."""
    with torch.no_grad():
        ours, theirs = model.propose(PIXELS), other.propose(PIXELS)
    assert torch.equal(ours.mask_logits, theirs.mask_logits) is masks
    assert (ours.mask_embeddings - theirs.mask_embeddings).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "shared"},
        {"bias_per_head": False},
        {"bias_per_layer": True},
        {"recognition": "blocked"},
        {"recognition": "pooling"},
        {"recognition": "queries"},
        {"recognition_scale": 1.0},
    ],
)
def test_switches_of_recognition_leave_the_masks_alone(changes, config, model):
    unchanged(model, like(config, model, **changes), masks=True)


@pytest.mark.parametrize(
    "changes", [{"fusion": {}}, {"fusion_kind": "gated"}, {"fusion_kind": "cross-attention"}, {"clip_scale": 1.0}]
)
def test_switches_of_the_features_change_the_masks(changes, config, model):
    unchanged(model, like(config, model, **changes), masks=False)


def test_a_gate_that_is_open_adds(config, model):
    gated = like(config, model, fusion_kind="gated")
    for block, own in model.side_adapter.fusion.items():
        part = gated.side_adapter.fusion[block]
        part.map.load_state_dict(own.state_dict())
        part.gate.weight.data.zero_()
        part.gate.bias.data.fill_(100)
    with torch.no_grad():
        assert torch.equal(gated.propose(PIXELS).mask_logits, model.propose(PIXELS).mask_logits)


def test_cross_attention_is_that_of_torch(config, model):
    """Patch tokens are queries, the layer's positions keys and values, three heads."""
    part = like(config, model, fusion_kind="cross-attention").side_adapter.fusion["1"]
    patches, tokens = torch.randn(2, 48, 48), torch.randn(2, 12, 32)
    plain = torch.nn.MultiheadAttention(48, part.heads, kdim=32, vdim=32, batch_first=True)
    keys, values = part.key_value.weight.chunk(2)
    plain.q_proj_weight.data, plain.k_proj_weight.data, plain.v_proj_weight.data = part.query.weight, keys, values
    plain.in_proj_bias.data = torch.cat([part.query.bias, part.key_value.bias])
    plain.out_proj.load_state_dict(part.out.state_dict())
    from opensan.model.backbones.base import FeatureMap

    normed = part.channel_norm(tokens)
    expected = patches + plain(part.patch_norm(patches), normed, normed)[0]
    torch.testing.assert_close(part(patches, FeatureMap(tokens, (3, 4)), (6, 8)), expected, atol=1e-5, rtol=1e-4)


def test_one_forward_pass_is_the_same_as_two_at_one_scale(config, model):
    """With the scale of the fusion's pass, a pass of its own gives the same numbers, for more work."""
    twice = like(config, model, recognition_scale=config.clip_scale)
    with torch.no_grad():
        assert torch.equal(model.propose(PIXELS).mask_embeddings, twice.propose(PIXELS).mask_embeddings)
    once, both = (count_multiply_adds(own, (96, 128), 3) for own in (config, twice.config))
    assert both["CLIP, recognition layers"] == once["CLIP, recognition layers"] + once["CLIP, shallow layers"]


def test_proposals_of_two_stages_run_no_clip(config):
    model = lively(variant(config, **VARIANTS["two-stage"]))
    with torch.no_grad():
        before = model.propose(PIXELS)
        for parameter in model.clip.parameters():
            parameter.fill_(torch.nan)
        after = model.propose(PIXELS)
    assert torch.equal(before.mask_logits, after.mask_logits)
    assert torch.equal(before.mask_embeddings, after.mask_embeddings)
    counts = count_multiply_adds(model.config, (96, 128), 3)
    assert counts["CLIP, shallow layers"] == 0 == counts["CLIP, recognition layers"]


def test_a_bias_for_each_layer_is_read_by_its_own_layer(config, model):
    """Equal parts give the same as one; another part for one layer alone changes the answer."""
    layered = like(config, model, bias_per_layer=True)
    last, own = (one.side_adapter.head.attention_mlp.layers[-1] for one in (layered, model))
    for kind in ("weight", "bias"):
        getattr(last, kind).data = torch.cat([getattr(own, kind)] * 2)
    with torch.no_grad():
        same, expected = layered.propose(PIXELS), model.propose(PIXELS)
        torch.testing.assert_close(same.mask_embeddings, expected.mask_embeddings)
        for part in (slice(len(own.weight)), slice(len(own.weight), None)):
            last.weight.data[part] *= -1
            assert (layered.propose(PIXELS).mask_embeddings - expected.mask_embeddings).abs().max() > 1e-3
            last.weight.data[part] *= -1


def test_one_bias_for_all_heads_is_the_same_in_each(config, model):
    single = like(config, model, bias_per_head=False)
    last, own = (one.side_adapter.head.attention_mlp.layers[-1] for one in (single, model))
    several = like(config, model)
    heads = model.clip.attention_heads
    for kind in ("weight", "bias"):
        part = getattr(own, kind)[: len(getattr(own, kind)) // heads]
        getattr(last, kind).data = part.clone()
        getattr(several.side_adapter.head.attention_mlp.layers[-1], kind).data = torch.cat([part] * heads)
    with torch.no_grad():
        torch.testing.assert_close(single.propose(PIXELS).mask_embeddings, several.propose(PIXELS).mask_embeddings)


def test_a_shared_heads_bias_is_its_mask_logits(config, model):
    shared = like(config, model, head="shared")
    with torch.no_grad():
        found = shared.propose(PIXELS)
        scale = shared.side_adapter.head.bias_scale
        torch.testing.assert_close(
            found.attention_bias[:, 0], found.mask_logits * scale.weight.squeeze() + scale.bias.squeeze()
        )
        features = shared.shallow_features(PIXELS)
        bias = found.attention_bias.expand(-1, 4, -1, -1, -1)
        torch.testing.assert_close(found.mask_embeddings, shared.clip.recognise(features, bias))


def test_a_blocked_attention_sees_the_mask_alone(config, model):
    """What lies outside a mask has no influence: patches there may be anything."""
    blocked = like(config, model, recognition="blocked")
    clip = blocked.clip
    with torch.no_grad():
        features = blocked.shallow_features(PIXELS[:1])
        masks = torch.full((1, 1, 2, *(2 * side for side in features.grid)), -3.0)
        masks[:, :, 0, :4, :4] = 2.0
        first = blocked._recognise(PIXELS[:1], features, masks)
        masks[:, :, 0, :4, :4] = 0.5
        assert torch.equal(first, blocked._recognise(PIXELS[:1], features, masks)), "no more than inside or outside"
        plain = clip.recognise(features, torch.zeros(1, 4, 2, *features.grid))
        assert (first - plain).abs().max() > 1e-3


def test_pooling_is_the_weighted_mean_of_the_last_features(config, model):
    pooling = like(config, model, recognition="pooling")
    with torch.no_grad():
        found = pooling.propose(PIXELS)
        features = pooling.shallow_features(PIXELS)
        x = features.tokens
        for block in pooling.clip.visual.transformer.resblocks[config.recognition_layer :]:
            x = block(x)
        dense = pooling.clip.visual.ln_post(x[:, 1:]) @ pooling.clip.visual.proj
        resized = F.interpolate(found.mask_logits, size=features.grid, mode="bilinear", align_corners=False).sigmoid()
        for image in range(2):
            for query in range(3):
                weights = resized[image, query].flatten()
                mean = sum(weight * row for weight, row in zip(weights, dense[image], strict=True)) / weights.sum()
                torch.testing.assert_close(
                    found.mask_embeddings[image, query], mean / mean.norm(), atol=1e-5, rtol=1e-4
                )


def recognition_gradients(config, **changes) -> set[str]:
    """The trained parameters that a loss on the embeddings alone reaches."""
    model = lively(variant(config, **changes)).train()
    (model.propose(PIXELS).mask_embeddings @ torch.ones(24)).sum().backward()
    return {entry.name for entry in model.trained() if entry.parameter.grad is not None and entry.parameter.grad.any()}


def test_the_cut_keeps_recognition_out_of_the_proposals(config):
    whole, cut = recognition_gradients(config), recognition_gradients(config, cut_gradient=True)
    assert {name for name in whole if name.startswith("side_adapter.blocks")}
    own = ("side_adapter.head.attention_mlp", "side_adapter.head.bias_scale", "clip.")
    assert cut == {name for name in whole if name.startswith(own)}
    assert {name.split(".")[0] for name in recognition_gradients(config, recognition="blocked")} <= {"clip"}
    assert not recognition_gradients(config, recognition="pooling", cut_gradient=True) - {
        "clip.visual.positional_embedding"
    }


def test_what_of_clip_is_trained(config, model):
    names = {
        kind: {entry.name for entry in lively(variant(config, trained_clip=kind)).trained() if "clip." in entry.name}
        for kind in ("none", "position", "whole")
    }
    assert names["none"] == set() and names["position"] == {"clip.visual.positional_embedding"}
    tower = {f"clip.{name}" for name, _ in model.clip.named_parameters() if name.startswith("visual.")}
    assert names["whole"] == tower
    spared = san_parameter_groups(lively(variant(config, trained_clip="whole")))[1].names
    assert {"clip.visual.positional_embedding", "clip.visual.ln_post.weight"} <= set(spared)
    trained = [count_parameters(lively(variant(config, trained_clip=kind)))["all"].trained for kind in names]
    assert trained == sorted(trained) and all(a < b for a, b in pairwise(trained))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fusion": {1: 4}}, "side_adapter.fusion 1: 4 needs a side block below 4 and a CLIP layer up to 3"),
        ({"head": "shared", "bias_per_layer": True}, "about a bias that recognition bias with this head does not have"),
        ({"recognition": "pooling", "bias_per_head": False}, "about a bias that recognition pooling"),
        ({"recognition": "blocked", "cut_gradient": True}, "recognition blocked sends no gradient"),
        ({"recognition": "queries", "recognition_scale": 1.0}, "recognition by queries runs no CLIP"),
        ({"recognition": "guessing"}, "Input should be 'bias', 'blocked', 'pooling' or 'queries'"),
        ({"fusion_kind": "multiply"}, "Input should be 'add', 'gated' or 'cross-attention'"),
        ({"recognition_layer": 5}, "recognition_layer 5 is not between 1 and 4"),
    ],
)
def test_what_cannot_be_built_is_one_line(changes, problem, config):
    with pytest.raises(UserError, match=problem) as caught:
        variant(config, **changes)
    assert "\n" not in str(caught.value)


def test_other_backbones_have_no_layers_to_steer():
    from .encoders import small_san

    around = small_san("efficientnet_lite").config
    for changes in ({"bias_per_layer": True}, {"recognition": "pooling"}):
        with pytest.raises(UserError, match=r"need a plain ViT \(clip_vit\), not efficientnet_lite"):
            variant(around, **changes)


def test_a_variant_is_not_exported(config):
    from opensan.export.traced import graphs

    for changes in ({"recognition": "pooling"}, {"recognition_scale": 1.0}):
        with pytest.raises(UserError, match="only models that recognise by a bias, in one forward pass, are exported"):
            graphs(lively(variant(config, **changes)), text=False)
