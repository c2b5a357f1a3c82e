/* A stub of libamdhip64 for machines without AMD hardware: it answers as one or two GPUs of FAKE_HIP_ARCH (gfx942,
 * gfx950; anything else is no device). FAKE_HIP_UNITS overrides the CU count, FAKE_HIP_XCCS the XCD count (0: the
 * driver does not know the attribute), FAKE_HIP_LINK the kind of link between two of them. As in the real library the out-value of a failed call is left as it was. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_DEVICE = 101 };
enum { NUMBER_OF_XCCS = 10018, PROPERTIES_SIZE = 1472 };

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value ? value : otherwise;
}
static int is_950(void) { return strcmp(setting("FAKE_HIP_ARCH", ""), "gfx950") == 0; }
static int devices(void) { return is_950() ? 2 : strcmp(setting("FAKE_HIP_ARCH", ""), "gfx942") == 0; }

int hipGetDeviceCount(int *count) {
  *count = devices();
  return *count ? SUCCESS : NO_DEVICE;
}

/* Offsets of hipDeviceProp_tR0600. */
static void put32(char *record, int offset, int32_t value) { memcpy(record + offset, &value, sizeof value); }
static void put64(char *record, int offset, uint64_t value) { memcpy(record + offset, &value, sizeof value); }

int hipGetDevicePropertiesR0600(char *record, int device) {
  if (device < 0 || device >= devices()) return INVALID_DEVICE;
  memset(record, 0, PROPERTIES_SIZE);
  strcpy(record, setting("FAKE_HIP_NAME", is_950() ? "AMD Instinct MI355X" : "AMD Instinct MI300X"));
  strcpy(record + 1160, is_950() ? "gfx950:sramecc+:xnack-" : "gfx942:sramecc+:xnack-");
  put64(record, 288, is_950() ? 309220868096ULL : 206141652992ULL); /* totalGlobalMem */
  put64(record, 296, is_950() ? 163840 : 65536);                    /* sharedMemPerBlock */
  put32(record, 308, 64);                                           /* warpSize */
  put32(record, 320, 1024);                                         /* maxThreadsPerBlock */
  put32(record, 348, is_950() ? 2400000 : 2100000);                 /* clockRate */
  put32(record, 388, atoi(setting("FAKE_HIP_UNITS", is_950() ? "256" : "304"))); /* multiProcessorCount */
  put32(record, 608, is_950() ? 2000000 : 1300000);                 /* memoryClockRate */
  put32(record, 612, 8192);                                         /* memoryBusWidth */
  return SUCCESS; /* l2CacheSize and maxThreadsPerMultiProcessor stay 0, as HIP documents of itself */
}

int hipDeviceGetAttribute(int *value, int attribute, int device) {
  int xccs = atoi(setting("FAKE_HIP_XCCS", "8"));
  if (device < 0 || device >= devices()) return INVALID_DEVICE;
  if (attribute != NUMBER_OF_XCCS || xccs == 0) return INVALID_VALUE;
  *value = xccs;
  return SUCCESS;
}

int hipExtGetLinkTypeAndHopCount(int a, int b, uint32_t *kind, uint32_t *hops) {
  if (a < 0 || b < 0 || a >= devices() || b >= devices()) return INVALID_DEVICE;
  *kind = atoi(setting("FAKE_HIP_LINK", "4"));
  *hops = 1;
  return SUCCESS;
}

int hipRuntimeGetVersion(int *version) {
  *version = 60443483;
  return SUCCESS;
}
