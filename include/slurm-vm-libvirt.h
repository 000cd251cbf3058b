/* What the agent uses of libvirt. Nothing of libvirt's own text is copied here. */
#include <libvirt/libvirt.h>
#include <libvirt/virterror.h>
