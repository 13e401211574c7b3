"""All exhibits with what they plant and measure; texts.py has their words, and their order."""

from museum.arithmetic import eval_repacks, fp16_overflow, rate_too_high
from museum.asking import doubled_bos, padding_attended, wrong_template
from museum.bug import Bug
from museum.deploying import adapter_not_applied, merged_into_wrong_base, rslora_unscaled
from museum.labels import duplicates_leaked, end_masked, labels_masked, masked_by_pad_id

ALL = (
    *(labels_masked, end_masked, masked_by_pad_id, duplicates_leaked),
    *(rate_too_high, fp16_overflow, eval_repacks),
    *(adapter_not_applied, rslora_unscaled, merged_into_wrong_base),
    *(doubled_bos, wrong_template, padding_attended),
)
BUGS: dict[str, Bug] = {bug.name: bug for bug in ALL}
