/* What the plugin uses of Slurm: spank(8). Nothing of Slurm's own text is copied here. */
#include <slurm/spank.h>
