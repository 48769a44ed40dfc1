"""The head against mmdet's and transformers', and its losses against an independent account in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from mmcv import ConfigDict
from mmcv.cnn.bricks.transformer import FFN, build_transformer_layer_sequence
from mmdet.models.plugins import MSDeformAttnPixelDecoder as MmdetPixelDecoder
from torch import nn

from internseg_ds.models.mask2former.pixel_decoder import CheckpointedFFN, with_own_layers
from internseg_ds.models.sampling.deformable_attention import DeformableAttention
from tests.models.mask2former.small_mask2former import build, config, features, targets


@pytest.fixture(scope="module")
def head() -> nn.Module:
    return build(config()).decode_head.eval()


def assert_alike(ours, theirs):
    for layers in zip(ours, theirs, strict=True):
        for mine, other in zip(*layers, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-4)


def test_the_published_names_and_shapes_and_what_mmdets_head_computes_with_them(head):
    from mmcv.cnn.bricks.registry import ATTENTION
    from mmdet.models.dense_heads import Mask2FormerHead

    model = config()
    arguments = {
        key: value
        for key, value in model.decode_head.items()
        if key not in ("type", "in_index", "num_classes")
    }
    theirs = Mask2FormerHead(
        **arguments, num_things_classes=5, num_stuff_classes=0, train_cfg=model.train_cfg
    ).eval()
    decoder = {
        **model.decode_head.pixel_decoder,
        "in_channels": [128] * 4,
        "feat_channels": 64,
        "out_channels": 64,
    }
    decoder.pop("type")
    theirs.pixel_decoder = MmdetPixelDecoder(**decoder).eval()  # ours has taken its name in the registry
    assert type(theirs.pixel_decoder.encoder.layers[0].attentions[0]) is ATTENTION.get(
        "MultiScaleDeformableAttention"
    )
    theirs.load_state_dict(head.state_dict(), strict=True)
    maps = features()
    with torch.no_grad():
        assert_alike(head(maps), theirs(maps, [{}] * 2))


def transformers_head(head: nn.Module):
    """transformers' pixel decoder, decoder and class scores, with the weights of our head, under their
    names."""
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerPixelDecoder,
        Mask2FormerTransformerModule,
    )

    sizes = Mask2FormerConfig(
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_feedforward_dim=256,
        dim_feedforward=256,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=6,
        feature_strides=[4, 8, 16, 32],
        common_stride=4,
        dropout=0.0,
        activation_function="relu",
    )
    parts = nn.ModuleDict(
        {
            "pixel_decoder": Mask2FormerPixelDecoder(sizes, [128] * 4),
            "decoder": Mask2FormerTransformerModule(64, sizes),
        }
    )
    ours, theirs = head.state_dict(), {}

    def take(their: str, our: str) -> None:
        theirs.update(
            {f"{their}.{end}": ours[f"{our}.{end}"] for end in ("weight", "bias") if f"{our}.{end}" in ours}
        )

    theirs["pixel_decoder.level_embed"] = ours["pixel_decoder.level_encoding.weight"]
    for level in range(3):
        take(f"pixel_decoder.input_projections.{level}.0", f"pixel_decoder.input_convs.{level}.conv")
        take(f"pixel_decoder.input_projections.{level}.1", f"pixel_decoder.input_convs.{level}.gn")
    for name, place in (("adapter_1", "lateral_convs"), ("layer_1", "output_convs")):
        take(f"pixel_decoder.{name}.0", f"pixel_decoder.{place}.0.conv")
        take(f"pixel_decoder.{name}.1", f"pixel_decoder.{place}.0.gn")
    take("pixel_decoder.mask_projection", "pixel_decoder.mask_feature")
    for index in range(2):
        their, our = f"pixel_decoder.encoder.layers.{index}", f"pixel_decoder.encoder.layers.{index}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            take(f"{their}.self_attn.{part}", f"{our}.attentions.0.{part}")
        for name, place in (
            ("self_attn_layer_norm", "norms.0"),
            ("final_layer_norm", "norms.1"),
            ("fc1", "ffns.0.layers.0.0"),
            ("fc2", "ffns.0.layers.1"),
        ):
            take(f"{their}.{name}", f"{our}.{place}")
    for name, place in (
        ("queries_embedder", "query_embed"),
        ("queries_features", "query_feat"),
        ("level_embed", "level_embed"),
        ("decoder.layernorm", "transformer_decoder.post_norm"),
    ):
        take(f"decoder.{name}", place)
    for index in range(3):
        take(f"decoder.decoder.mask_predictor.mask_embedder.{index}.0", f"mask_embed.{2 * index}")
        their, our = f"decoder.decoder.layers.{index}", f"transformer_decoder.layers.{index}"
        for end in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
            theirs[f"{their}.cross_attn.{end}"] = ours[f"{our}.attentions.0.attn.{end}"]
        take(f"{their}.self_attn.out_proj", f"{our}.attentions.1.attn.out_proj")
        for end in ("weight", "bias"):
            for part, value in zip(
                "qkv", ours[f"{our}.attentions.1.attn.in_proj_{end}"].chunk(3), strict=True
            ):
                theirs[f"{their}.self_attn.{part}_proj.{end}"] = value
        for name, place in (
            ("cross_attn_layer_norm", "norms.0"),
            ("self_attn_layer_norm", "norms.1"),
            ("final_layer_norm", "norms.2"),
            ("fc1", "ffns.0.layers.0.0"),
            ("fc2", "ffns.0.layers.1"),
        ):
            take(f"{their}.{name}", f"{our}.{place}")
    parts.load_state_dict(theirs, strict=True)
    return parts.eval()


def test_all_layers_put_out_what_transformers_mask2former_does_with_the_same_weights():
    model = config()
    model.decode_head.pixel_decoder.norm_cfg.num_groups = 32  # theirs cannot be chosen
    head = build(model).decode_head.eval()
    assert (
        sum(param.numel() for param in head.parameters())
        == sum(param.numel() for param in transformers_head(head).parameters()) + 65 * 6
    )
    parts, maps = transformers_head(head), features()
    with torch.no_grad():
        pixels = parts["pixel_decoder"](maps, return_dict=True)
        decoded = parts["decoder"](list(pixels.multi_scale_features), pixels.mask_features)
        scores = [head.cls_embed(queries.transpose(0, 1)) for queries in decoded.intermediate_hidden_states]
        assert_alike(head(maps), (scores, decoded.masks_queries_logits))


def bilinear(image, x, y):
    """image (h, w) at one place of [0, 1] x [0, 1]; 0 outside."""
    height, width = image.shape
    column, row = x * width - 0.5, y * height - 0.5
    left, top = int(torch.floor(column)), int(torch.floor(row))
    total = 0.0
    for i, j in itertools.product((top, top + 1), (left, left + 1)):
        if 0 <= i < height and 0 <= j < width:
            total = total + (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j]
    return total


def at(image, points):
    return torch.stack([torch.as_tensor(bilinear(image, *point), dtype=torch.float64) for point in points])


def test_losses_are_those_of_an_account_in_fp64_with_matches_of_all_permutations(head):
    """The paper's section 3: 2 for classes (0.1 for no object), 5 for the cross entropy and 5 for dice, of
    the best of all assignments."""
    labels, masks = targets([3, 0], [1], size=16)
    maps = features()
    points, oversampled = head.num_points, int(3 * head.num_points)
    with torch.no_grad():
        all_scores, all_masks = (list(layers) for layers in head(maps))
        torch.manual_seed(5)
        found = head.forward_train(maps, [{}] * 2, None, gt_labels=labels, gt_masks=masks)
    torch.manual_seed(5)
    # the points of the matching come first
    drawn = [[torch.rand(1, points, 2)[0] for _ in range(2)] for _ in all_scores]
    for layer, (scores, logits) in enumerate(zip(all_scores, all_masks, strict=True)):
        scores, logits, pairs = scores.double(), logits.double(), []
        for image in range(2):
            wanted = [at(mask.double(), drawn[layer][image].double()) for mask in masks[image]]
            seen = [at(query, drawn[layer][image].double()) for query in logits[image]]
            probability = scores[image].softmax(-1)

            def cost(query, index, image=image, wanted=wanted, seen=seen, probability=probability):
                share = seen[query].sigmoid()
                dice = 1 - (2 * (share * wanted[index]).sum() + 1) / (share.sum() + wanted[index].sum() + 1)
                return (
                    -2 * probability[query, labels[image][index]]
                    + 5 * F.binary_cross_entropy_with_logits(seen[query], wanted[index])
                    + 5 * dice
                )

            costs = [[float(cost(query, index)) for index in range(len(wanted))] for query in range(6)]
            best = min(
                itertools.permutations(range(6), len(wanted)),
                key=lambda queries: sum(costs[query][index] for index, query in enumerate(queries)),
            )
            pairs.extend(sorted((image, query, index) for index, query in enumerate(best)))
        classes = torch.full((2, 6), 5)
        for image, query, index in pairs:
            classes[image, query] = labels[image][index]
        weight = torch.tensor([1.0] * 5 + [0.1], dtype=torch.float64)[classes]
        nll = -scores.log_softmax(-1).gather(2, classes[..., None])[..., 0]
        loss_cls = 2 * (weight * nll).sum() / weight.sum()
        proposed = torch.rand(3, oversampled, 2)
        chosen = []
        for (image, query, _), places in zip(pairs, proposed, strict=True):
            uncertain = at(logits[image, query], places.double()).abs().argsort()[: int(0.75 * points)]
            chosen.append(places[uncertain])
        chosen = torch.cat(
            [torch.stack(chosen), torch.rand(3, points - int(0.75 * points), 2)], dim=1
        ).double()
        loss_mask = loss_dice = 0.0
        for (image, query, index), places in zip(pairs, chosen, strict=True):
            logit, truth = at(logits[image, query], places), at(masks[image][index].double(), places)
            loss_mask += 5 * F.binary_cross_entropy_with_logits(logit, truth) / 3
            loss_dice += (
                5
                * (1 - (2 * (logit.sigmoid() * truth).sum() + 1) / (logit.sigmoid().sum() + truth.sum() + 1))
                / 3
            )
        prefix = "" if layer == len(all_scores) - 1 else f"d{layer}."
        for name, expected in (("loss_cls", loss_cls), ("loss_mask", loss_mask), ("loss_dice", loss_dice)):
            torch.testing.assert_close(found[prefix + name].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels", [[[3, 0], []], [[], []]])
def test_all_parameters_get_gradients_where_images_have_no_masks(labels):
    head = build(config()).decode_head
    gt_labels, gt_masks = targets(*labels)
    losses = head.forward_train(features(), [{}] * 2, None, gt_labels=gt_labels, gt_masks=gt_masks)
    sum(losses.values()).backward()
    assert [name for name, param in head.named_parameters() if param.grad is None] == []
    assert (losses["loss_mask"] == 0) == (labels == [[], []])


def test_values_that_are_not_finite_come_out_as_a_loss_that_is_not_finite(head):
    labels, masks = targets([3, 0], [1])
    maps = features()
    maps[0][0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        losses = head.forward_train(maps, [{}] * 2, None, gt_labels=labels, gt_masks=masks)
    assert not torch.isfinite(sum(losses.values()))


def test_logits_of_pixels_are_class_probabilities_times_mask_probabilities(head):
    maps = features()
    with torch.no_grad():
        scores, masks = (layers[-1].double() for layers in head(maps))
        found = head.forward_test(maps)
    expected = sum(
        scores.softmax(-1)[:, query, :5, None, None] * masks[:, query, None].sigmoid() for query in range(6)
    )
    assert found.shape == (2, 5, 8, 8)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_with_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for with_cp in (False, True):
        model = config()
        for part in (model.decode_head.pixel_decoder.encoder, model.decode_head.transformer_decoder):
            part.transformerlayers.ffn_cfgs.with_cp = with_cp
        head = build(model).decode_head
        assert head.transformer_decoder.layers[0].ffns[0].with_cp is with_cp
        sum(
            scores.square().sum() + masks.square().mean()
            for scores, masks in zip(*head(features()), strict=True)
        ).backward()
        gradients.append([param.grad for param in head.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_layers_may_be_configured_one_by_one_and_leave_their_ffn_to_mmcv():
    decoder = config().decode_head.pixel_decoder
    layer = decoder.encoder.transformerlayers
    other = ConfigDict(
        {
            **layer,
            "attn_cfgs": [layer.attn_cfgs],
            "ffn_cfgs": [{**layer.ffn_cfgs, "feedforward_channels": 32}],
        }
    )
    encoder = ConfigDict({**decoder.encoder, "transformerlayers": [layer, other]})
    built = build_transformer_layer_sequence(
        with_own_layers(encoder, {"MultiScaleDeformableAttention": DeformableAttention})
    )
    assert [type(layer.attentions[0]) for layer in built.layers] == [DeformableAttention] * 2
    assert [(type(layer.ffns[0]), layer.ffns[0].feedforward_channels) for layer in built.layers] == [
        (CheckpointedFFN, 256),
        (CheckpointedFFN, 32),
    ]
    assert encoder.transformerlayers[0].ffn_cfgs.type == "FFN"  # a copy was changed
    # as wide as mmcv's own FFN
    plain = ConfigDict({**layer, "attn_cfgs": {**layer.attn_cfgs, "embed_dims": 256}})
    del plain["ffn_cfgs"]
    built = build_transformer_layer_sequence(with_own_layers({**encoder, "transformerlayers": plain}, {}))
    assert [type(layer.ffns[0]) for layer in built.layers] == [FFN] * 2


@pytest.mark.parametrize("place", ["transformer_decoder", "pixel_decoder.encoder"])
def test_a_head_whose_layers_are_configured_one_by_one_is_refused_in_a_sentence(place: str):
    model = config()
    sequence = (
        model.decode_head.transformer_decoder
        if place == "transformer_decoder"
        else model.decode_head.pixel_decoder.encoder
    )
    sequence.transformerlayers = [sequence.transformerlayers] * sequence.num_layers
    with pytest.raises(ValueError, match=f"{place}.transformerlayers .*Mask2FormerHead"):
        build(model)
