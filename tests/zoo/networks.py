"""Networks of torchvision, timm, Hugging Face and others, with random weights, and what each is fed. Nothing is downloaded."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
NEEDED = "torchvision", "timm", "transformers", "diffusers", "peft", "segmentation_models_pytorch"


@dataclass(frozen=True)
class Network:
    """How a network is built, and one value to train on, computed with it."""

    family: str
    name: str
    build: Callable[[], nn.Module]
    value: Callable[[nn.Module], Tensor]

    def __repr__(self) -> str:
        return f"{self.family}:{self.name}"


def first(output: Any) -> Tensor:
    """The tensor that a model's output begins with."""
    while not isinstance(output, Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def on_images(size: int, *frames: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: first(model(torch.randn(2, 3, *frames, size, size))).float().square().mean()


def of_vision(name: str, **options: Any) -> nn.Module:
    models: Any = importlib.import_module("torchvision.models")
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    backbone = {"weights_backbone": None} if "." in name and not name.startswith("video") else {}
    return models.get_model(name.rpartition(".")[2], weights=None, **extra, **backbone, **options)


def of_timm(name: str, **options: Any) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=False, **options)


def of_transformers(name: str, config: str, **options: Any) -> nn.Module:
    models: Any = importlib.import_module("transformers")
    return getattr(models, name)(getattr(models, config)(**options))


def of_diffusers(name: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module("diffusers"), name)(**options)


def of_segmentation(name: str, **options: Any) -> nn.Module:
    return getattr(importlib.import_module("segmentation_models_pytorch"), name)(encoder_weights=None, **options)


def adapted() -> nn.Module:
    peft: Any = importlib.import_module("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, r=4)
    return peft.get_peft_model(of_transformers("GPT2LMHeadModel", "GPT2Config", **GPT2), config)


def on_words(length: int = 12, **more: Callable[[Tensor], Any]) -> Callable[[nn.Module], Tensor]:
    def value(model: nn.Module) -> Tensor:
        words = torch.randint(3, 90, (2, length))
        return model(input_ids=words, **{name: make(words) for name, make in more.items()}).loss

    return value


def itself(words: Tensor) -> Tensor:
    return words


def on_waves(model: nn.Module) -> Tensor:
    return first(model(torch.randn(2, 1600))).square().mean()


def on_spectrograms(model: Any) -> Tensor:
    return model(input_features=torch.randn(2, 80, 64), decoder_input_ids=torch.tensor([[1, 2], [3, 4]])).logits.square().mean()


def on_pairs(model: Any) -> Tensor:
    words = torch.randint(3, 90, (2, 8))
    return model(input_ids=words, pixel_values=torch.randn(2, 3, 32, 32), return_loss=True).loss


def by_pixels(model: Any) -> Tensor:
    return first(model(pixel_values=torch.randn(2, 3, 32, 32))).square().mean()


def by_noise(model: Any, **more: Any) -> Tensor:
    return first(model(torch.randn(2, 4, 16, 16), 7, torch.randn(2, 5, 16), return_dict=False, **more)).square().mean()


def by_noise_and_edges(model: Any) -> Tensor:
    return by_noise(model, controlnet_cond=torch.randn(2, 3, 128, 128))


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {**SMALL, "vocab_size": 100}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {**WORDS, "bos_token_id": 1, "eos_token_id": 2}
IMAGES = {**SMALL, "image_size": 32, "patch_size": 8}
DIFFUSION = {"block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4}
DIFFUSION |= {"norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
SPEECH = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SPEECH |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100, "max_source_positions": 32, "pad_token_id": 0}
SPEECH |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WAVES = {**WORDS, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8}
WAVES |= {"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}

VISION = [
    "alexnet", "vgg11", "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121", "squeezenet1_1",
    "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x1_0", "mnasnet1_0",
    "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16",
    "maxvit_t", "segmentation.lraspp_mobilenet_v3_large", "segmentation.deeplabv3_mobilenet_v3_large", "video.r3d_18",
]  # fmt: skip
TIMM = [
    "resnetv2_50x1_bit", "eca_nfnet_l0", "nf_resnet26", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "vit_small_r26_s32_224", "tf_efficientnet_b0", "mobilenetv3_small_100", "convnext_atto", "levit_128s", "mixnet_s",
    "skresnet18", "repvgg_a0", "swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224", "tiny_vit_5m_224",
    "edgenext_xx_small", "pvt_v2_b0", "poolformer_s12", "mixer_s32_224",
]  # fmt: skip
SIZES = {"inception_v3": 299, "vit_b_16": 224, "maxvit_t": 224, "googlenet": 96, "alexnet": 96}
FIXED = {"levit_128s", "swin_tiny_patch4_window7_224", "xcit_nano_12_p8_224", "tiny_vit_5m_224", "vit_small_r26_s32_224"}
RESIZED = {"vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_s32_224"}

HUGGING = [
    ("GPT2LMHeadModel", "GPT2Config", GPT2, on_words(labels=itself)),
    ("LlamaForCausalLM", "LlamaConfig", TEXT, on_words(labels=itself)),
    ("MixtralForCausalLM", "MixtralConfig", {**TEXT, "num_local_experts": 4, "num_key_value_heads": 2}, on_words(labels=itself)),
    ("BertForMaskedLM", "BertConfig", WORDS, on_words(labels=itself)),
    ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2,
     "vocab_size": 100, "decoder_start_token_id": 0}, on_words(labels=itself)),
    ("ViTForImageClassification", "ViTConfig", IMAGES, by_pixels),
    ("ResNetForImageClassification", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, by_pixels),
    ("BitForImageClassification", "BitConfig", {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 16,
     "num_groups": 4}, by_pixels),
    ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": IMAGES}, on_pairs),
    ("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVES, on_waves),
    ("WhisperForConditionalGeneration", "WhisperConfig", SPEECH, on_spectrograms),
]  # fmt: skip

NETWORKS = [
    *(
        Network(
            "torchvision",
            name.rpartition(".")[2],
            partial(of_vision, name),
            on_images(SIZES.get(name, 64), *([8] if name.startswith("video") else [])),
        )
        for name in VISION
    ),
    *(
        Network(
            "timm",
            name,
            partial(of_timm, name, **({"img_size": 64} if name in RESIZED else {})),
            on_images(224 if name in FIXED else 64),
        )
        for name in TIMM
    ),
    *(Network("transformers", name, partial(of_transformers, name, config, **options), value)
      for name, config, options, value in HUGGING),
    Network("peft", "LoRA of GPT2LMHeadModel", adapted, on_words(labels=itself)),
    Network("diffusers", "UNet2DConditionModel", partial(of_diffusers, "UNet2DConditionModel",
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **DIFFUSION), by_noise),
    Network("diffusers", "ControlNetModel", partial(of_diffusers, "ControlNetModel", **DIFFUSION), by_noise_and_edges),
    Network("segmentation_models_pytorch", "Unet", partial(of_segmentation, "Unet", encoder_name="resnet18"), on_images(64)),
    Network("segmentation_models_pytorch", "FPN", partial(of_segmentation, "FPN", encoder_name="mobilenet_v2"), on_images(64)),
]  # fmt: skip
