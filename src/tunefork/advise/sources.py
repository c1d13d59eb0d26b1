"""What the rules cite. `THUMB` are the rules of thumb that practitioners go by, by number."""

THUMB: dict[int, tuple[str, str, str]] = {
    1: ("share of parameters trained", "0.1-3 %", "100 %"),
    2: ("memory", "10-100x less", "the whole model with its optimiser on the GPU"),
    3: ("training time", "3-5x faster", "slower"),
    4: ("artefact for a 70B model", "often under 1 GB", "about 140 GB"),
    5: ("quality", "1-3 % below full", "the highest"),
    6: ("serving", "one base, many adapters", "one model a task"),
    7: ("cost of one experiment", "$50-500 (larger: $500-5,000)", "$5K-50K and more"),
    8: ("infrastructure", "one GPU often does", "8 or more 80 GB GPUs for 70B"),
    9: ("4-bit base (QLoRA)", "70B on one 48 GB GPU; 24 GB up to 13B", "not applicable"),
    10: ("knobs", "adds rank, alpha, target modules", "fewer"),
    11: ("adapters and bases", "an adapter belongs to one exact version of its base", "-"),
    12: ("depth of change", "behaviour and a domain's language move less far", "they can move"),
    13: ("rank", "start at 16 or 32; 64-128 for deeper change; always measure", "-"),
    14: ("durations", "5K-50K examples on 7-13B: hours to a day on one GPU", "days to weeks"),
}
"""Number -> dimension, what is said of LoRA and QLoRA, what of full fine-tuning. They are what the
advice starts from where nothing was measured, not what it holds to be true."""


def thumb(number: int) -> str:
    """How a rule of thumb is cited."""
    return f"rule of thumb {number} (docs/advice.md)"


REGRET = "LoRA Without Regret, https://thinkingmachines.ai/blog/lora/"
LESS = "LoRA Learns Less and Forgets Less, https://arxiv.org/abs/2405.09673"
QLORA = "QLoRA, https://arxiv.org/abs/2305.14314"
RETRIEVE = "Fine-Tuning or Retrieval?, https://arxiv.org/abs/2312.05934"
NEW_FACTS = "Fine-Tuning on New Knowledge and Hallucinations, https://arxiv.org/abs/2405.05904"
OPENAI = "OpenAI's guide, https://developers.openai.com/api/docs/guides/supervised-fine-tuning"
S_LORA = "S-LoRA, https://arxiv.org/abs/2311.03285"
DISTIL = "Sequence-Level Knowledge Distillation, https://arxiv.org/abs/1606.07947"
TULU = "Tulu 2, https://arxiv.org/abs/2311.10702"
SPEED = "measured on one H200, 8B shape, 16k tokens a step (PEFT, Unsloth and plain PyTorch)"
VLLM = "measured on one H200: vLLM 0.25.1, rank 16 on all linear layers, 128 tokens in and out"
PLAN = "tunefork plan (predicted)"
RUNS = "your own comparison, {folder}"
DEMO = "examples/results/01_route_requests.json (135M only)"
ARITHMETIC = "arithmetic on your situation"
