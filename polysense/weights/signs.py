"""How to tell published layouts apart: for error messages only. A layout is always named by the user, never guessed."""
import re
from collections.abc import Iterable

SIGNS: dict[tuple[str, str], str] = {
    ("clip", "hf"): r"vision_model\.embeddings\.patch_embedding\.weight",
    ("clip", "openai"): r"visual\.conv1\.weight",
    ("clip", "open_clip"): r"visual\.(conv1\.weight|trunk\..*)",
    ("coca", "open_clip"): r"text_decoder\.cross_attn\.0\.ln_1_kv\.weight",
    ("coop", "official"): r"(prompt_learner\.)?ctx",
    ("virtex", "official"): r"textual\.embedding\.words\.weight",
    ("clip_scaling", "open_clip"): r"visual\.conv1\.weight",
    ("flip", "open_clip"): r"visual\.conv1\.weight",
    ("unicl", "official"): r"image_encoder\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table",
    ("klite", "official"): r"image_encoder\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table",
    ("mofi", "hf"): r"vision_model\.embeddings\.patch_embedding\.weight",
    ("declip", "official"): r"encode_text\.text_projection\.weight",
    ("dual_triplet", "official"): r"txt_enc\.rnn\.weight_ih_l0",
    ("lit", "official"): r"txt\.BertEncoder_0\.embedder\.embedders_token_ids\.embedding",
    ("slip", "official"): r"image_mlp\.layer1\.weight",
    ("laclip", "official"): r"visual\.patch_embed\.proj\.weight",
    ("laclip", "open_clip"): r"visual\.conv1\.weight",
    ("eva_clip", "official"): r"visual\.blocks\.0\.attn\.q_bias",
    ("eva_clip", "open_clip"): r"visual\.trunk\.blocks\.0\.attn\.(q_proj\.bias|q_bias)",
    ("languagebind", "hf"): r"vision_model\.embeddings\.patch_embedding\.weight",
    ("vit", "timm"): r"patch_embed\.proj\.weight",
    ("vit", "jax"): r"Transformer\.encoder_norm\.scale",
    ("vit", "hf"): r"(vit\.)?embeddings\.patch_embeddings\.projection\.weight",
    ("resnet", "timm"): r"layer1\.0\.conv1\.weight",
    ("resnet", "hf"): r"(resnet\.)?embedder\.embedder\.convolution\.weight",
    ("flamingo", "idefics"): r"model\.gated_cross_attn_layers\.0\.alpha_cross_attn",
    ("llava_1_5", "hf"): r"(model\.)?multi_modal_projector\.linear_1\.weight",
    ("llava_1_5", "official"): r"model\.mm_projector\.2\.weight",
    ("llava", "official"): r"model\.mm_projector\.weight",
    ("llama", "hf"): r"(model\.)?layers\.0\.self_attn\.q_proj\.weight",
    ("opt", "hf"): r"(model\.)?decoder\.layers\.0\.self_attn\.q_proj\.weight",
    ("mae", "hf"): r"decoder\.decoder_pos_embed",
    ("mae", "facebook"): r"decoder_pos_embed",
    ("ddpm", "diffusers"): r"time_embedding\.linear_1\.weight",
    ("albef", "albef"): r"text_encoder\.bert\.encoder\.layer\.\d+\.crossattention\.self\.query\.weight",
    ("albef", "vqa"): r"text_decoder\.bert\.encoder\.layer\.\d+\.crossattention\.self\.query\.weight",
    ("dalle_dvae", "openai"): r"encoder\.blocks\.group_1\.block_1\.res_path\.conv_1\.w",
    ("dalle_dvae", "flava"): r"(image_codebook\.)?blocks\.group_1\.group\.block_1\.res_path\.path\.conv_1\.weight",
    ("bevt", "torchvision"): r"features\.0\.0\.attn\.relative_position_bias_table",
    ("bevt", "mmaction"): r"backbone\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table",
    ("vit_vqgan", "enhancing"): r"encoder\.en_pos_embedding",
    ("vq_gan", "taming"): r"encoder\.down\.0\.block\.0\.conv1\.weight",
    ("vq_gan", "diffusers"): r"encoder\.mid_block\.resnets\.0\.conv1\.weight",
    ("sam", "hf"): r"mask_decoder\.upscale_conv1\.weight",
    ("nerf", "nerf_pytorch"): r"network_fine_state_dict\.alpha_linear\.weight",
    ("sam", "official"): r"mask_decoder\.output_upscaling\.0\.weight",
    ("beit", "hf"): r"beit\.(encoder\.relative_position_bias|shared_position_bias)\.relative_position_bias_table",
    ("beit", "hf_classifier"): r"beit\.pooler\.layernorm\.weight",
    ("beit", "unilm"): r"rel_pos_bias\.relative_position_bias_table",
    ("maskfeat", "slowfast"): r"pred_head\.projections\.0\.weight",
    ("maskfeat", "slowfast_video"): r"blocks\.0\.attn\.pool_q\.weight",
    ("data2vec_vision", "hf"): r"(data2vec_vision\.)?encoder\.relative_position_bias\.relative_position_bias_table",
    ("eva", "baai"): r"blocks\.0\.attn\.q_bias",
    ("eva", "baai_classifier"): r"blocks\.0\.attn\.q_bias",
    ("eva", "timm"): r"blocks\.0\.attn\.q_bias",
    ("cae", "official"): r"pretext_neck\.regressor_blocks\.0\.norm1_q\.weight",
    ("beit_3", "unilm"): r"beit3\.text_embed\.weight",
    ("beit_3", "unilm_retrieval"): r"language_head\.weight",
    ("beit_3", "unilm_captioning"): r"mlm_head\.weight",
    ("beit_3", "unilm_vqa"): r"pooler\.dense\.weight",
    ("beit_3", "unilm_labels"): r"fc_norm\.weight",
    ("beit_3", "unilm_nlvr2"): r"head\.dense1\.weight",
    ("vlmo", "unilm"): r"transformer\.blocks\.0\.mlp_imag\.fc1\.weight",
    ("beit_v2", "unilm"): r"cls_pt_layers\.0\.norm1\.weight",
    ("beit_v2", "unilm_tokenizer"): r"encode_task_layer\.0\.weight",
    ("simmim", "hf"): r"swin\.embeddings\.mask_token",
    ("simmim", "hf_vit"): r"vit\.embeddings\.mask_token",
    ("simmim", "official"): r"encoder\.layers\.0\.blocks\.0\.attn\.relative_position_bias_table",
    ("imagebind", "official"): r"modality_trunks\.vision\.blocks\.0\.norm_1\.weight",
    ("simclr", "torchvision"): r"layer1\.0\.conv1\.weight",
    ("simsiam", "facebook"): r"encoder\.fc\.6\.bias",
    ("moco", "facebook"): r"(encoder_q|base_encoder)\.(conv1|patch_embed\.proj)\.weight",
    ("latent_diffusion", "diffusers"): r"unet\.down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn2\.to_k\.weight",
    ("latent_diffusion", "original"): r"model\.diffusion_model\.input_blocks\.1\.1\.transformer_blocks\.0\.attn2\.to_k\.weight",
    ("latent_diffusion", "text2im"): r"bert\.model\.embed_tokens\.weight",
    ("dino", "hf"): r"embeddings\.patch_embeddings\.projection\.weight",
    ("dino", "facebook"): r"(student\.backbone\.)?patch_embed\.proj\.weight",
    ("ibot", "bytedance"): r"(student\.backbone\.)?patch_embed\.proj\.weight",
    ("dinov2", "hf"): r"encoder\.layer\.0\.layer_scale1\.lambda1",
    ("dinov2", "facebook"): r"blocks\.(0\.)?0\.ls1\.gamma",
    ("blip2", "hf"): r"qformer\.encoder\.layer\.\d+\.intermediate_query\.dense\.weight",
    ("blip2", "lavis"): r"Qformer\.bert\.encoder\.layer\.\d+\.intermediate_query\.dense\.weight",
    ("controlnet", "diffusers"): r"controlnet\.controlnet_cond_embedding\.conv_in\.weight",
    ("controlnet", "original"): r"control_model\.input_hint_block\.0\.weight",
    ("videomae", "hf"): r"videomae\.embeddings\.patch_embeddings\.projection\.weight",
    ("mae_st", "official"): r"decoder_pos_embed_spatial",
    ("mae_st", "slowfast"): r"pred_head\.transforms\.0\.0\.norm1\.weight",
    ("vgg", "torchvision"): r"classifier\.0\.weight",
    ("vgg", "timm"): r"pre_logits\.fc1\.weight",
    ("deit", "timm"): r"dist_token",
    ("deit", "hf"): r"deit\.embeddings\.distillation_token",
    ("mamba", "hf"): r"backbone\.layers\.0\.mixer\.A_log",
    ("supervised", "timm"): r"stages\.0\.blocks\.0\.norm1\.weight",
    ("supervised", "hf"): r"bit\.embedder\.convolution\.weight",
    ("nfnet", "timm"): r"stages\.0\.0\.skipinit_gain",
    ("alexnet", "torchvision"): r"classifier\.1\.weight",
    ("bert", "hf"): r"(bert\.)?embeddings\.word_embeddings\.weight",
    ("transformer", "marian"): r"final_logits_bias",
    ("bert", "roberta"): r"(roberta\.)?embeddings\.word_embeddings\.weight",
}


def bears(keys: Iterable[str], of: str, layout: str) -> bool:
    """Whether a key that every file of this system and layout has is among `keys`."""
    sign = re.compile(SIGNS[of, layout])
    return any(sign.fullmatch(k) for k in keys)


def recognise(keys: Iterable[str]) -> list[str]:
    """The `system/layout` pairs whose files look like this, such as `clip/openai`."""
    keys = list(keys)
    return [f"{of}/{layout}" for of, layout in SIGNS if bears(keys, of, layout)]


def hint(keys: Iterable[str]) -> str:
    """What the file may be, as the second half of an error message."""
    found = recognise(keys)
    return f"it looks like {' or '.join(found)} (system/layout)" if found else "its names are those of no layout known here"
