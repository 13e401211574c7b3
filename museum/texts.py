"""What the museum says of each bug: title, cause in two sentences, fix, what catches it, reports upstream."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    title: str
    cause: str
    fix: str
    guard: str  # what catches it, and its file
    upstream: tuple[str, ...]  # owner/name#number
    hint: str  # which measurement tells this bug from the others

    @property
    def links(self) -> list[str]:
        """https://github.com/owner/name/issues/7; GitHub leads on where that is a pull request."""
        return [f"https://github.com/{each.replace('#', '/issues/')}" for each in self.upstream]


# In the order in which a run meets them: rows and labels, arithmetic, the adapter, who asks.
TEXTS = {
    "labels-masked": Text(
        "All labels of many rows are masked",
        "Rows were cut at their end, where the answer stands: a long row keeps its text and loses all "
        "its labels. The loss is the mean over the labels that are left, so it falls as if nothing were "
        "wrong.",
        "shorten the text, not the row (qlora/prompts.py: fitted_messages), or raise --max-length",
        "qlora/training/guards.py: labels_present",
        ("unslothai/unsloth#1128", "huggingface/trl#6668"),
        "count the labels of each row that are not -100: is there a row without any?",
    ),
    "end-masked": Text(
        "The end token is masked",
        "The labels cover the words of the answer and stop before its end token. So the model learns "
        "what to say, but nothing teaches it to stop, and it talks on until the limit of tokens.",
        "the end token belongs to the answer (qlora/prompts.py: turn_ids keeps it)",
        "qlora/training/guards.py: end_supervised, of the rows",
        ("unslothai/unsloth#416", "huggingface/smol-course#159"),
        "look at the last label of a row that is not -100: is it the end token?",
    ),
    "pad-by-id": Text(
        "Padding is masked by its token id",
        "This tokenizer pads with its end token, and the collator masks every label whose token is the "
        "pad token. It hides the end of each answer as well, although the rows themselves are right.",
        "mask by position, as qlora/batches.py: collate does",
        "qlora/training/guards.py: end_supervised, of the batches",
        ("huggingface/transformers#23530", "huggingface/trl#976"),
        "compare a row's labels with the same row's labels in its batch: are as many left?",
    ),
    "duplicates-leaked": Text(
        "Duplicates are on both sides of the split",
        "The file has reviews twice, and it was shuffled and cut before they were removed. "
        "So held-out rows were trained on: their score measures memory, not skill.",
        "remove duplicates before the split, as qlora/data.py: load_rows does",
        "qlora/data.py: without_duplicates",
        ("huggingface/datasets#4261", "embeddings-benchmark/mteb#1036"),
        "which texts stand both in the training rows and in the held-out rows?",
    ),
    "rate-too-high": Text(
        "The learning rate is a hundred times too high",
        "The first steps throw the model far away, and what comes back only knows that there are two "
        "answers. The loss falls again for the rest of the run, which looks like learning.",
        "python qlora_finetune.py --find-lr tries five rates; start from 5e-4",
        "qlora/training/forgetting.py: measure, the loss on neutral text (each run's report has it)",
        ("haotian-liu/LLaVA#1301",),
        "do different rows get different answers, and what is the loss on other text before and after?",
    ),
    "fp16-overflow": Text(
        "fp16 overflows",
        "A few channels of this model pass 65504, the largest number of fp16; bf16 and fp32 hold them. "
        "The loss of such a batch is not finite, its update is skipped, and transformers logs the mean "
        "so far instead.",
        "bf16, or fp32 where the hardware has none (T4); logging_nan_inf_filter=False shows the true loss",
        "qlora/training/guards.py: check_step (finite), updates_applied",
        ("huggingface/transformers#11461", "google-research/text-to-text-transfer-transformer#539"),
        "is the loss of every step finite, and is every update applied?",
    ),
    "eval-repacks": Text(
        "An evaluation repacks the 4-bit weights",
        "On processors with AVX512-BF16 bitsandbytes repacks 4-bit weights at the first evaluation, and "
        "never unpacks them. The repacked product has no backward pass, so from then on most of the "
        "gradient is lost.",
        "module.support_avx512bf16_for_cpu = False for each Linear4bit (qlora/loading.py: never_repack)",
        "qlora/training/guards.py: nothing_repacked",
        ("bitsandbytes-foundation/bitsandbytes#1804",),
        "compare the gradients of one batch before and after an evaluation",
    ),
    "adapter-not-applied": Text(
        "The adapter is loaded and not applied",
        "The names of the matrices in the file are not those of the model, so none of them finds its place. "
        "PEFT warns at most and goes on with an untrained adapter, which is exactly the base.",
        "compare the file's names with the model's before use; refuse what is left over",
        "qlora/adapters.py: check_keys",
        ("huggingface/peft#2566", "vllm-project/vllm#49354"),
        "are the deployed answers those of the base? Then look for the names of the file's matrices in "
        "the model",
    ),
    "rslora-unscaled": Text(
        "rsLoRA's scale is taken for LoRA's",
        "The adapter was trained with rsLoRA, which scales B A by alpha/sqrt(r), and the deployed "
        "program scales it by alpha/r. At r = 16 it adds a quarter of what was trained.",
        "write alpha * sqrt(r) for readers that know alpha/r only (llama.cpp/export.py --lora does), or "
        "merge",
        "llama.cpp/ladder.py: cause (python llama.cpp/parity.py asks it)",
        ("NVIDIA/TensorRT-LLM#1668", "vllm-project/vllm#6909"),
        "are the deployed answers neither the trained ones nor the base's? Then ask at other strengths "
        "of B A",
    ),
    "merged-into-wrong-base": Text(
        "The adapter is merged into another base",
        "The base was downloaded again under its old name, and its makers had uploaded other weights of "
        "the same shapes. All matrices fit, so nothing fails, and the sum is a model that nobody "
        "trained.",
        "keep the base's revision with the adapter, and refuse another one (qlora.json has it)",
        "qlora/adapters.py: check_base",
        ("unslothai/unsloth#1519",),
        "compare the base's revision in qlora.json with that of the base which is used",
    ),
    "doubled-bos": Text(
        "The prompt begins with two BOS tokens",
        "The chat template writes the BOS token, and the program that turns its text into ids adds "
        "another one. The model never saw two of them in training, and nothing fails: it only answers a "
        "little differently.",
        "tokenize a template's text with add_special_tokens=False; compare ids, not text",
        "llama.cpp/ladder.py: prompt_cause (python llama.cpp/parity.py asks it)",
        ("ggml-org/llama.cpp#7332", "sgl-project/sglang#888"),
        "compare the first ids of a prompt that was asked with those of a training row",
    ),
    "wrong-template": Text(
        "The model is asked in another template",
        "Training wrote the conversation in the model's own chat template, and the deployed program "
        "writes it in another one. What was learned belongs to the tokens of training's prompt, so much "
        "of it does not show.",
        "use the tokenizer's own chat template on both sides; the prompt travels with the adapter in "
        "qlora.json",
        "llama.cpp/ladder.py: prompt_cause (python llama.cpp/parity.py asks it)",
        ("unslothai/unsloth#7792", "hiyouga/LlamaFactory#6020"),
        "decode the ids of a prompt that was asked, and those of a training row, and read both",
    ),
    "padding-attended": Text(
        "Padding is attended to",
        "Rows of a batch were padded on the left without an attention mask, so every token sees the "
        "padding in front of it. A row's answer then depends on how long its neighbours are.",
        "give the attention mask along, or pad on the right, where a causal model never looks "
        "(qlora/evaluation.py: score_labels)",
        "museum/asking.py: same_beside_others, a measurement of six lines",
        ("huggingface/transformers#14521", "TransformerLensOrg/TransformerLens#1005"),
        "ask one row alone and the same row in a batch: are the scores equal?",
    ),
}
