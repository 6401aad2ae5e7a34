"""The scores that papers report, from one confusion matrix summed over the whole data set."""

from collections.abc import Sequence

from torch import Tensor


def scores(confusion: Tensor, class_names: Sequence[str]) -> dict[str, Tensor]:
    """Compute the confusion-matrix family (Long et al., FCN, section 5), ignored pixels left out by the matrix.

    Args:
        confusion: ``(K, K)``, pixels of true class (row) predicted as class (column).
        class_names: one per class.

    Returns:
        ``miou``, the mean of IoU over classes that occur in prediction or truth; ``pixel_acc``; ``mean_acc``, the mean
        of recall over classes that occur in truth; ``fwiou``, IoU weighted by true frequency; and ``iou/<class>``,
        nan for a class that occurs nowhere. Scalars in 0..1.
    """
    matrix = confusion.cpu().double()  # exact up to 2 ** 53 pixels
    hit, truth, predicted = matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)
    iou = hit / (truth + predicted - hit)  # (K,), 0/0 is nan
    values = {
        "miou": iou.nanmean(),
        "pixel_acc": hit.sum() / matrix.sum(),
        "mean_acc": (hit / truth).nanmean(),
        "fwiou": (truth * iou).nansum() / matrix.sum(),
    }
    return values | {f"iou/{name}": value for name, value in zip(class_names, iou, strict=True)}
