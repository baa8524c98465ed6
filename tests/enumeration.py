"""What step terms do in expectation, and how noisy they are, by exact sums: `python tests/enumeration.py`.

The table of docs/algorithm.md, on the tabular policies of test_spro.py: vocabulary 2, G = 2, fixed length, means over
5 random policies.
"""

import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

import baselines  # noqa: E402
import spro  # noqa: E402
from baselines.relatives import answer_evidence  # noqa: E402

from test_spro import Tabular  # noqa: E402

LENGTHS = range(1, 7)
SHOWN = 4  # tokens of the policies whose expected gradients are compared


def step_term(name: str):
    """An estimator less its outcome."""
    return lambda batch, algo: baselines.ADVANTAGES[name](batch, algo) - spro.grpo_advantage(batch, algo)


def compared(values):
    """MSA of `values` (batch -> [B, T]), as in the estimators."""
    return lambda batch, _: spro.masked_step_advantage(values(batch), batch.mask, batch.group_size)


def posterior(batch):
    """P(success | y_<=t) / P(success), exact."""
    return answer_evidence(batch).exp()


def difference(batch):
    return posterior(batch).diff(dim=1, prepend=torch.ones(len(batch), 1).double())


TERMS = {  # name -> (term, the term whose variance its own is compared with)
    "spro": (step_term("spro"), step_term("spro_local")),
    "spro_local": (step_term("spro_local"), step_term("spro_local")),
    "spro_history": (step_term("spro_history"), step_term("spro_local")),
    "prl": (step_term("prl"), step_term("spro_local")),
    "exact posterior": (compared(posterior), compared(difference)),
    "its difference": (compared(difference), compared(difference)),
    "oppo": (step_term("oppo"), compared(difference)),
}


def directions(policy: Tabular) -> dict[str, torch.Tensor]:
    """Gradients of the chance of success, of the KL token by token, and of that of whole responses."""
    log_pi, log_ref = (policy.log_probs(x).sum(1) for x in (policy.theta, policy.ref_theta))
    success, kl = (log_pi.exp() * policy.rewards).sum(), (log_pi.exp() * (log_pi - log_ref)).sum()
    return {
        "success": torch.autograd.grad(success, policy.theta, retain_graph=True)[0],
        "KL by token": policy.kl_gradient([1.0] * policy.mask.shape[1]),
        "KL of responses": torch.autograd.grad(kl, policy.theta)[0],
    }


def cosine(a, b) -> float:
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), 0)) if a.norm() > 1e-12 else 0.0


def noise(policy: Tabular, term, other) -> float:
    """The term's variance over the other's. Where both push alike but not as hard, each as a part of its push."""
    pushes = [policy.expected_gradient(x).norm().item() for x in (term, other)]
    alike = cosine(policy.expected_gradient(term), policy.expected_gradient(other)) > 0.9
    scale = (pushes[1] / pushes[0]) ** 2 if alike else 1.0
    return scale * policy.variance(term) / policy.variance(other)


def main() -> None:
    policies = {n: [Tabular(2, vocabulary=2, length=n, seed=seed) for seed in range(5)] for n in LENGTHS}
    targets = [directions(policy) for policy in policies[SHOWN]]
    print(f"| term | {' | '.join(targets[0])} | {' | '.join(map(str, LENGTHS))} |")
    for name, (term, other) in TERMS.items():
        gradients = [policy.expected_gradient(term) for policy in policies[SHOWN]]
        cells = [
            statistics.fmean(cosine(g, target[key]) for g, target in zip(gradients, targets, strict=True))
            for key in targets[0]
        ]
        cells += [statistics.fmean(noise(policy, term, other) for policy in policies[n]) for n in LENGTHS]
        print(f"| {name} | {' | '.join(f'{x:.2f}' for x in cells)} |")


if __name__ == "__main__":
    main()
