"""Vision scorers on tiny random models of the real classes, saved to a folder and loaded from there."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from unidiff.rewards.reward import Cause
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.rewards.table import reward_table
from unidiff.scorers.vision import aesthetic_score, clip_score, from_open_clip, hps_score, pick_score
from unidiff.sequence import Modality


def clip_config(words):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": words, "max_position_embeddings": 8, "projection_dim": 12, "eos_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8, "projection_dim": 12}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A CLIP that is small, random, and far from giving everything the same score."""
    path = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(clip_config(len(tokenizer)))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(path)
    return str(path)


@pytest.fixture
def views():
    rng = np.random.default_rng(0)
    rows = []
    for words in ("find the goal", "go right", "find a safe way to the goal"):
        pixels = rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)
        view = SegmentView(modality=Modality.IMAGE, tokens=torch.arange(4), pixels=pixels)
        rows += link_row([view], prompt=[words], columns={"caption": "go left"})
    return rows


def by_hand(folder, views, texts, tokenizer):
    """(cosine, logit) of each picture and text, one at a time, through the published classes."""
    model, process = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    scores = []
    for view, words in zip(views, texts):
        pixels = process(images=view.image, return_tensors="pt")["pixel_values"]
        ids = torch.tensor([tokenizer(words)["input_ids"][:8]])
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixels)
        logit = out.logits_per_image.item()
        scores.append((logit / model.logit_scale.exp().item(), logit))
    return [list(column) for column in zip(*scores)]


def test_clip_and_pick_score(folder, views, tokenizer, rng_untouched):
    cosine, logit = by_hand(folder, views, [view.prompt[0] for view in views], tokenizer)
    assert max(cosine) - min(cosine) > 0.02
    score = clip_score(folder, weight=2.0)
    assert (score.name, score.on, score.weight) == ("clip_score", "image", 2.0)
    assert score(views) == pytest.approx(cosine, abs=1e-5)
    assert clip_score(folder, loading={"batch": 2})(views) == pytest.approx(cosine, abs=1e-5)
    assert pick_score(folder)(views) == pytest.approx(logit, abs=1e-4)
    captions, _ = by_hand(folder, views, ["go left"] * 3, tokenizer)
    assert clip_score(folder, column="caption")(views) == pytest.approx(captions, abs=1e-5)


def test_nothing_is_loaded_before_it_is_needed():
    score = clip_score("no/such-model")
    with pytest.raises(OSError, match="no/such-model"):
        score([SegmentView(modality=Modality.IMAGE, tokens=torch.arange(1), pixels=np.zeros((2, 2, 3), np.uint8))])


def to_open_clip(state):
    """The weights of a CLIPModel as open_clip names and shapes them, written down independently of the code."""
    renamed = {
        "logit_scale": state["logit_scale"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T.clone(),
        "visual.proj": state["visual_projection.weight"].T.clone(),
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
    }
    for kind in ("weight", "bias"):
        renamed[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        renamed[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        renamed[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        for theirs, ours in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
            for i in range(2):
                block, layer = f"{theirs}.resblocks.{i}", f"{ours}.encoder.layers.{i}"
                qkv = [state[f"{layer}.self_attn.{n}_proj.{kind}"] for n in "qkv"]
                renamed[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
                for a, b in (
                    ("attn.out_proj", "self_attn.out_proj"),
                    ("ln_1", "layer_norm1"),
                    ("ln_2", "layer_norm2"),
                    ("mlp.c_fc", "mlp.fc1"),
                    ("mlp.c_proj", "mlp.fc2"),
                ):
                    renamed[f"{block}.{a}.{kind}"] = state[f"{layer}.{b}.{kind}"]
    return renamed


def test_hps_loads_an_open_clip_checkpoint(folder, views, tokenizer, tmp_path):
    state = CLIPModel.from_pretrained(folder).state_dict()
    theirs = to_open_clip(state)
    back = from_open_clip({f"module.{name}": value for name, value in theirs.items()})
    assert {n for n in state if not n.endswith("position_ids")} == set(back)
    torch.save({"epoch": 1, "state_dict": theirs}, tmp_path / "hps.pt")
    cosine, _ = by_hand(folder, views, [view.prompt[0] for view in views], tokenizer)
    assert hps_score(str(tmp_path / "hps.pt"), folder)(views) == pytest.approx(cosine, abs=1e-5)
    with pytest.raises(ValueError, match=r"has 'visual.head.weight', which is not a weight"):
        from_open_clip({"visual.head.weight": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match=r"download HPS_v2.1_compressed.pt"):
        hps_score("nowhere.pt")


def test_aesthetic_head(folder, views, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (8, 12), 2: (4, 8), 10: (1, 4)}  # 10 after 2: numbers, not words
    head = {f"layers.{n}.weight": torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    head |= {f"layers.{n}.bias": torch.randn(shape[0], generator=generator) for n, shape in shapes.items()}
    save_file(head, tmp_path / "head.safetensors")
    scores = aesthetic_score(str(tmp_path / "head.safetensors"), folder)(views)
    model, process = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    for view, score in zip(views, scores):
        pixels = process(images=view.image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            x = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
        x = x / x.norm()
        for n in shapes:
            x = head[f"layers.{n}.weight"] @ x + head[f"layers.{n}.bias"]
        assert score == pytest.approx(x.item(), abs=1e-4)
    save_file({"layers.0.weight": torch.zeros(3, 12)}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"the last of them \[1, d\]"):
        aesthetic_score(str(tmp_path / "bad.safetensors"), folder)


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_an_odd_row_loses_its_own_score(folder, views, batch):
    odd = {"number": 3, "list": ["go left"], "surrogate": "\ud800", "none": None}
    rows = [*views, *(link_row([views[0]], columns={"caption": one})[0] for one in odd.values()), *views]
    rows[4:4] = link_row([views[0]], columns={"text": "go left"})
    made = clip_score(folder, column="caption", loading={"batch": batch})
    table = reward_table([made], [(view,) for view in rows])
    values = table.values_BSF[:, 0, 0].tolist()
    assert values[:3] == values[-3:] == pytest.approx(made.function(views), abs=1e-6)
    lost = {row: loss.message for (_, row, _), loss in table.missing.items()}
    assert set(lost) == {3, 4, 5, 6, 7} and lost[3].startswith("raised TypeError: a picture is scored with a text, not")
    assert lost[3].endswith("; the column 'caption' holds 3")
    assert "the row has no column 'caption'; it has: text" in lost[4] and "UnicodeEncodeError" in lost[6]
    assert table.missing[0, 7, 0].cause is Cause.NONE
