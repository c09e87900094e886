"""Judging: fidelity of an SAE, behaviour of a model, and behaviour under edits beside random controls."""

from saetools.evaluate.causal import certify_latents
from saetools.evaluate.certificate import Candidate, Certificate, Certification, DosedAnswers, Effect
from saetools.evaluate.certificate_config import CertificateConfig
from saetools.evaluate.coherence import AnswerCoherence, CoherenceLimits, Judge, measure_coherence
from saetools.evaluate.dose import Control, DosePoint, DoseResponse, dose_response, edit_norm
from saetools.evaluate.fidelity import Fidelity, measure_fidelity
from saetools.evaluate.forced_choice import ForcedChoiceScore, score_forced_choice
from saetools.evaluate.judge import coherence_judge
from saetools.evaluate.perplexity import Perplexity, measure_perplexity
from saetools.evaluate.plot import plot_dose_response
from saetools.evaluate.predictions import splice
from saetools.evaluate.role_fidelity import DENSE_RATE, FREQUENCY_EDGES, RoleFidelity
from saetools.evaluate.sweep import Sweep, SweepConfig, max_coherent_strength, sweep_edits
from saetools.evaluate.verify import Suspect, Verdict, verify_sae

__all__ = [
    "DENSE_RATE",
    "FREQUENCY_EDGES",
    "AnswerCoherence",
    "Candidate",
    "Certificate",
    "CertificateConfig",
    "Certification",
    "CoherenceLimits",
    "Control",
    "DosePoint",
    "DoseResponse",
    "DosedAnswers",
    "Effect",
    "Fidelity",
    "ForcedChoiceScore",
    "Judge",
    "Perplexity",
    "RoleFidelity",
    "Suspect",
    "Sweep",
    "SweepConfig",
    "Verdict",
    "certify_latents",
    "coherence_judge",
    "dose_response",
    "edit_norm",
    "max_coherent_strength",
    "measure_coherence",
    "measure_fidelity",
    "measure_perplexity",
    "plot_dose_response",
    "score_forced_choice",
    "splice",
    "sweep_edits",
    "verify_sae",
]
