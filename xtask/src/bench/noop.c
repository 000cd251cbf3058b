/* The base of `bench plugin`: a SPANK plugin with the hooks that ours has, each of which does nothing. */
#include <slurm/spank.h>

SPANK_PLUGIN(noop, 1);

int slurm_spank_init(spank_t sp, int ac, char **av) { return 0; }
int slurm_spank_init_post_opt(spank_t sp, int ac, char **av) { return 0; }
int slurm_spank_job_prolog(spank_t sp, int ac, char **av) { return 0; }
int slurm_spank_job_epilog(spank_t sp, int ac, char **av) { return 0; }
int slurm_spank_task_post_fork(spank_t sp, int ac, char **av) { return 0; }
int slurm_spank_task_init(spank_t sp, int ac, char **av) { return 0; }
