"""What the prior system published, as far as notebooks stand it beside ours: figures read off its notebooks.

https://github.com/ShridharPol/Skin-Lesion-GAN-Augmentation-and-Classification
"""

from stgan_utils.lesions import PRIOR_TRAINING_ORDER

# Its classifier on the 1,512 real test images of ISIC 2018 Task 3: rows true, columns as it named them, both in the
# order of `lesions.CLASSES`. Its outputs came in PRIOR_TRAINING_ORDER.
CONFUSION = (
    (3, 0, 6, 12, 20, 0, 2),
    (14, 0, 9, 58, 6, 0, 6),
    (33, 0, 162, 11, 2, 0, 9),
    (8, 0, 2, 2, 1, 0, 31),
    (84, 2, 71, 5, 2, 2, 5),
    (760, 0, 78, 12, 2, 0, 57),
    (11, 0, 1, 7, 0, 12, 4),
)

DATA_NAME = "ISIC 2018 Task 3, test images, as the prior system published"

# The same network on its validation images: a random fifth, stratified by class, of real and generated images together.
MIXED_RIGHT = dict(zip(PRIOR_TRAINING_ORDER, (1172, 721, 796, 830, 728, 623, 532), strict=True))
MIXED_IMAGES = 5790
MIXED_NV_IMAGES = 1341  # a fifth of 6,705: of NV it had no generated image
