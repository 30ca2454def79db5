"""Captions: encodings, languages, and a vision-language model with random weights in a local folder."""

import json
import shutil

import av
import numpy as np
import pytest

from lapa.schema import Captioner, IngestConfig
from tests.video_data import layouts
from tests.video_data.encode import write_clip
from video_data.annotate import write_captions
from video_data.captions import captioner
from video_data.captions.frames import shown_frames, spread
from video_data.captions.language import detect_language
from video_data.captions.text import clean_caption, decode_text
from video_data.clips import ClipRequest
from video_data.sources import list_requests


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain", "plain"),
        ("straße".encode(), "straße"),
        ("straße".encode("utf-8-sig"), "straße"),
        ("straße".encode("utf-16"), "straße"),
        ("straße".encode("utf-32"), "straße"),
    ],
)
def test_bytes_that_state_their_encoding_are_read(data, text):
    assert decode_text(data) == text


@pytest.mark.parametrize("data", ["straße".encode("latin-1"), b"\xff\xfe\xfa", b"\x80abc"])
def test_other_bytes_are_not_guessed_at(data):
    with pytest.raises(ValueError):
        decode_text(data)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("  pour\tthe\n tea ", "pour the tea"),
        ("schÃ¶n drÃ¼cken", "schön drücken"),
        ("salt &amp; pepper", "salt & pepper"),
        ("the robotâ€™s gripper", "the robot's gripper"),
        ("nul\x00 and bell\x07", "nul and bell"),
        ("把锅放在炉子上", "把锅放在炉子上"),
        ("", ""),
    ],
)
def test_captions_are_one_clean_line(given, expected):
    assert clean_caption(given) == expected


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("pick up the yellow bottle on the table", "en"),
        ("nimm die gelbe Flasche vom Tisch und stelle sie ab", "de"),
        ("把锅放在炉子上", "zh"),
        ("ドアを開けてカップを置く", "ja"),
        ("문을 열고 컵을 놓다", "ko"),
        ("положи чашку на стол и закрой дверь", "ru"),
        ("open door", None),
        ("", None),
        ("https://example.invalid/a-long-address-of-a-video", None),
    ],
)
def test_a_language_is_told_where_the_caption_tells_it(caption, language):
    assert {detect_language(caption) for _ in range(3)} == {language}


def requests(*captions: str) -> list[ClipRequest]:
    return [ClipRequest(str(i), f"{i}.mp4", caption=c, caption_origin="csv") for i, c in enumerate(captions)]


def test_given_captions_stay_as_they_are():
    writer = captioner(Captioner())
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    assert writer.caption(frames, requests("lift it")[0]) == ("lift it", "csv")
    assert writer.caption_batch([frames] * 2, requests("a", "b")) == [("a", "csv"), ("b", "csv")]
    with pytest.raises(ValueError, match=r"captioner.name is 'human', expected given or vlm"):
        captioner(Captioner(name="human"))


def test_a_span_is_shown_from_its_own_first_frame_to_its_last(tmp_path):
    write_clip(tmp_path / "long.mp4", num_frames=160, size=(48, 32))
    # Far in, a key frame is sought; the frames must be the same as those of one pass from the beginning.
    with av.open(str(tmp_path / "long.mp4")) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for first in (0, 40, 130):
        request = ClipRequest("a", "long.mp4", first / 10, first / 10 + 2.0)
        shown = shown_frames(request, tmp_path, num_frames=20, fps=10.0, num_shown=3)
        assert (shown == np.stack([every[first + offset] for offset in (0, 10, 19)])).all()
    with pytest.raises(ValueError, match=r"clip a has no frames: long\.mp4 was changed"):
        shown_frames(ClipRequest("a", "long.mp4", 60.0, 62.0), tmp_path, num_frames=20, fps=10.0, num_shown=3)


def test_a_span_counts_from_the_first_frame_of_its_stream(tmp_path):
    write_clip(tmp_path / "late.mkv", num_frames=20, times=list(range(50, 70)))
    with av.open(str(tmp_path / "late.mkv")) as container:
        assert container.streams.video[0].start_time
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    shown = shown_frames(ClipRequest("a", "late.mkv", 0.5, 1.5), tmp_path, num_frames=10, fps=10.0, num_shown=2)
    assert (shown == np.stack([every[5], every[14]])).all()


class Numbering:
    """Writes the number of its batch."""

    def __init__(self):
        self.num_batches = 0

    def caption(self, frames, request):
        return self.caption_batch([frames], [request])[0]

    def caption_batch(self, frames, asked):
        self.num_batches += 1
        return [(str(self.num_batches), "test")] * len(asked)


def test_captions_that_were_begun_are_gone_on_with_by_the_same_captioner_alone(tmp_path):
    rows = [
        {"id": f"{i}", "video": f"{i}.mp4", "start_s": None, "end_s": None, "caption": "given", "caption_origin": "csv"}
        | {"source": "", "licence": "", "split": "", "url": "", "stated_fps": None, "episode": None}
        for i in range(4)
    ]
    options = Captioner(batch_size=2)
    assert len(write_captions(tmp_path, tmp_path, rows[:2], Numbering(), options)) == 2
    with (tmp_path / "captions.jsonl").open("a") as file:
        file.write('{"capt')
    went_on = write_captions(tmp_path, tmp_path, rows, writer := Numbering(), options)
    assert writer.num_batches == 1 and len(went_on) == 4
    began_anew = write_captions(
        tmp_path, tmp_path, rows, writer := Numbering(), Captioner(batch_size=2, prompt="other")
    )
    assert writer.num_batches == 2 and [row["caption"] for row in began_anew] == ["1", "1", "2", "2"]


@pytest.mark.parametrize("build", [layouts.webdataset, layouts.laq_jpeg, layouts.rlds])
def test_clips_are_shown_from_whatever_they_lie_in(tmp_path, build):
    root = tmp_path / "root"
    build(root)
    for request in list_requests("auto", root, IngestConfig(path="", output_dir="", source_column="")):
        num_frames = {"laq_jpeg": 3, "rlds": 2}.get(build.__name__, 12)
        assert shown_frames(request, root, num_frames, fps=10.0, num_shown=2).shape == (2, 32, 32, 3)


def test_frames_shown_are_spread_from_first_to_last():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 8) == [0, 1, 2]
    assert spread(1, 4) == [0]


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = ["the", "a", "robot", "hand", "cup", "lifts", "pushes", "describe", "video"]
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A LLaVA of a few thousand random weights, with its processor: the form of every model that is accepted."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=["<image>"], **special
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **sizes)
    text = transformers.LlamaConfig(vocab_size=len(SPECIAL + WORDS), num_key_value_heads=2, **sizes)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=SPECIAL.index("<image>"), vision_feature_layer=-1
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    # Random weights would mostly write the words that end a caption or stand for pictures.
    with torch.no_grad():
        model.get_output_embeddings().weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def clips(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, 5, 24, 32, 3), dtype=np.uint8))


def test_a_local_model_writes_the_captions_that_are_missing(model_folder):
    options = Captioner(name="vlm", model=str(model_folder), num_frames=2, batch_size=2, max_new_tokens=3, device="cpu")
    writer = captioner(options)
    # Clips of a batch may have different numbers of frames, down to one.
    shown = [clip[:length] for clip, length in zip(clips(4), (5, 5, 1, 3), strict=True)]
    asked = requests("", "given", "", "")
    written = writer.caption_batch(shown, asked)
    assert written[1] == ("given", "csv")
    for caption, origin in (written[0], written[2], written[3]):
        assert origin == "vlm"
        assert caption and set(caption.split()) <= set(WORDS)
    assert writer.caption_batch(shown, asked) == written
    assert writer.caption(shown[0], asked[0])[1] == "vlm"

    options.only_missing = False
    assert writer.caption(shown[1], asked[1])[1] == "vlm"


def test_only_a_local_folder_of_safetensors_is_loaded(model_folder, tmp_path):
    for folder, message in ((None, "needs captioner.model"), (tmp_path, r"no config\.json in")):
        with pytest.raises(ValueError, match=message):
            captioner(Captioner(name="vlm", model=folder and str(folder)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"no \*\.safetensors in"):
        captioner(Captioner(name="vlm", model=str(tmp_path)))
    with pytest.raises(ValueError, match=r"captioner\.batch_size is 0"):
        captioner(Captioner(name="vlm", model=str(model_folder), batch_size=0))


def test_code_in_a_model_folder_is_not_run(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "evil.py").write_text("raise SystemExit('code of the folder ran')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoModelForImageTextToText": "evil.Evil", "AutoConfig": "evil.E"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError):
        captioner(Captioner(name="vlm", model=str(folder)))
