/* What the agent uses of MUNGE: munge(3). Nothing of MUNGE's own text is copied here. */
#include <munge.h>
