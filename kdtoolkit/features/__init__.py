"""Intermediate features of any network.

A *tap* is a place where a feature is read: a stage, or a module. A *stage* is a part of the network
between two *boundaries*; they are found from one traced forward and numbered from 1. A boundary is
one tensor, rarely several, that everything behind it is computed from. So a stage can be *reset*:
the network's own stage is run on another network's feature in place of its input. An *adapter*
gives one network's feature the shape of another's.

Example:
    ```python
    student, teacher = Taps(student_net, at=[3]), Frozen(teacher_net, at=[3])
    adapter = Adapter(student.shapes[3], teacher.shapes[3])
    optimizer = torch.optim.SGD([*student_net.parameters(), *adapter.parameters()], lr=0.05)

    for images, labels in loader:  # in [0, 1]: Frozen normalises them itself, Taps does not
        logits, feats = student(images)
        with torch.no_grad():
            targets = teacher(images).feats
        loss = F.cross_entropy(logits, labels) + F.mse_loss(adapter(feats[3]), targets[3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    student.remove_hooks()
    teacher.release()
    ```
"""

from kdtoolkit.features.adapters import Adapter
from kdtoolkit.features.extractor import Taps
from kdtoolkit.features.frozen import Frozen
from kdtoolkit.features.hooks import remove_tap_hooks
from kdtoolkit.features.model_inputs import image_size
from kdtoolkit.features.preprocess import Preprocess

__all__ = ["Adapter", "Frozen", "Preprocess", "Taps", "image_size", "remove_tap_hooks"]
