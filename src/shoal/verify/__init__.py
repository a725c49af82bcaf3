"""A strategy beside one device, everything compared.

    certificate = shoal.verify(recipe, "dp2")
    certificate = shoal.verify(model_fn=…, batch_fn=…, loss_fn=…, strategy="dp2")
    certificate.ok, certificate.max_error["gradient"], certificate.cause

The ranks train as they always do, in float64 or less; rank 0 also trains a plain copy of the model
in a loop of torch's own pieces, and every rank compares what it has after each step. At the end a
checkpoint is moved across, from the ranks to one device and back.
"""

from shoal.callable_module import make_callable
from shoal.verify.certificate import Certificate
from shoal.verify.front import verify

__all__ = ["Certificate", "verify"]

make_callable(__name__, verify)
