"""The same numbers sooner: decoding, and log-probs of tokens.

Each is equal to the plain path of model.py and sample.py, and tested to be. Without this folder
those take the plain path, and nothing else changes.
"""

from fast.agreement import agrees, pack_rows, two_rows
from fast.decode import can_decode
from fast.log_probs import log_probs_of_tokens, logits_at_once, states_for_kl
from fast.recorded import decoding_loop
from fast.shared_prompts import (
    first_of_each_prompt,
    prompt_numbers,
    response_states,
    shares_prompts,
)
from fast.varlen import can_pack

__all__ = [
    "agrees",
    "can_decode",
    "can_pack",
    "decoding_loop",
    "first_of_each_prompt",
    "log_probs_of_tokens",
    "logits_at_once",
    "pack_rows",
    "prompt_numbers",
    "response_states",
    "shares_prompts",
    "states_for_kl",
    "two_rows",
]
