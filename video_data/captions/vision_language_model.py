"""Captions from a Hugging Face image-text-to-text model in a local folder, shown a few frames of a clip."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from video_data.captions.frames import spread
from video_data.captions.text import clean_caption
from video_data.clips import ClipRequest

ORIGIN = "vlm"


class VisionLanguageCaptioner:
    """Any model that AutoModelForImageTextToText and AutoProcessor load, with a chat template.

    options: the fields of lapa.schema.Captioner. Nothing is fetched, no code of the folder is run, and weights are
    read from safetensors alone. Decoding is greedy, so a clip always gets the same caption from the same batch.
    Raises ValueError for a folder without such a model.
    """

    def __init__(self, options):
        if not options.model:
            raise ValueError("captioner.name=vlm needs captioner.model: the local folder of a model")
        folder = Path(options.model).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"no config.json in {folder}: captioner.model must name the local folder of a model")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"no *.safetensors in {folder}: weights in other formats are not read")
        for name in ("num_frames", "batch_size", "max_new_tokens"):
            if getattr(options, name) < 1:
                raise ValueError(f"captioner.{name} is {getattr(options, name)}, expected at least 1")
        try:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError:
            raise ValueError(
                "captioner.name=vlm needs the package transformers: pip install 'lerobot_policy_lapa[transformers]'"
            ) from None
        self.options = options
        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        local = {"local_files_only": True, "trust_remote_code": False}
        self.processor = AutoProcessor.from_pretrained(folder, **local)
        # Generation goes on behind the prompt, so shorter prompts are filled up before it.
        self.processor.tokenizer.padding_side = "left"
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **local)
        self.model = model.to(device).eval()

    def caption(self, frames: np.ndarray, request: ClipRequest) -> tuple[str, str]:
        return self.caption_batch([frames], [request])[0]

    def caption_batch(self, frames: Sequence[np.ndarray], requests: Sequence[ClipRequest]) -> list[tuple[str, str]]:
        """(caption, origin) of clips whose frames are (T, H, W, 3) uint8 each, of which num_frames are looked at.

        With only_missing, a clip that came with a caption keeps it, and the model does not see it.
        """
        captions = [(request.caption, request.caption_origin) for request in requests]
        unwritten = [i for i, request in enumerate(requests) if not (self.options.only_missing and request.caption)]
        for batch in itertools.batched(unwritten, self.options.batch_size):
            shown = [[frames[i][t] for t in spread(len(frames[i]), self.options.num_frames)] for i in batch]
            for i, text in zip(batch, map(clean_caption, self._write(shown)), strict=True):
                captions[i] = (text, ORIGIN if text else "none")
        return captions

    def _write(self, shown: list[list[np.ndarray]]) -> list[str]:
        import torch

        prompts = [self._prompt(len(images)) for images in shown]
        inputs = self.processor(text=prompts, images=shown, padding=True, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            written = self.model.generate(**inputs, max_new_tokens=self.options.max_new_tokens, do_sample=False)
        return self.processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _prompt(self, num_images: int) -> str:
        content = [{"type": "image"}] * num_images + [{"type": "text", "text": self.options.prompt}]
        asked = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
