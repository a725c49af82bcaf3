"""Models to be right for: what people write, and what they write that is hard to split.

    from zoo import SUBJECTS
    SUBJECTS["gpt"].model_fn()

No module of the zoo knows of Shoal, but for the ResNets, which are Shoal's own plain modules.
"""

from zoo import awkward, hugging_face, images, others, perceptrons, sequences
from zoo.subject import Subject

SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for family in (images, sequences, perceptrons, others, hugging_face, awkward)
    for subject in family.SUBJECTS
}

__all__ = ["SUBJECTS", "Subject"]
