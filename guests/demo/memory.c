/* Memory: a bitmap of physical pages, and the page directories and tables of the address spaces. */
#include "kernel.h"
#include "x86.h"

#define PAGES (DIRECT_BYTES / PAGE_BYTES)
#define ENTRIES 1024
#define KERNEL_ENTRY (KERNEL_BASE >> 22)

static uint32_t in_use[PAGES / 32]; /* a bit for each page of the direct map */
static uint32_t first_free_hint;

static void mark(uint32_t page, bool used)
{
    if (used)
        in_use[page / 32] |= 1u << page % 32;
    else
        in_use[page / 32] &= ~(1u << page % 32);
}

/* Hand out what lies between the kernel's end and the end of RAM or of the direct map, whichever comes first, and
   write-protect the kernel's code. */
void memory_init(uint32_t ram_bytes)
{
    uint32_t first = ((uint32_t)kernel_end - KERNEL_BASE) / PAGE_BYTES;
    uint32_t end = ram_bytes < DIRECT_BYTES ? ram_bytes / PAGE_BYTES : PAGES;
    memset(in_use, 0xFF, sizeof in_use);
    for (uint32_t page = first; page < end; page++)
        mark(page, false);
    first_free_hint = first;

    for (uint32_t linear = (uint32_t)text_begin; linear < (uint32_t)text_end; linear += PAGE_BYTES)
        direct_tables[(linear - KERNEL_BASE) / PAGE_BYTES] &= ~PAGE_WRITE;
    write_cr3(read_cr3());
}

/* Keep the physical bytes [first, end) from being handed out. */
void memory_reserve(uint32_t first, uint32_t end)
{
    for (uint32_t page = first / PAGE_BYTES; page < PAGES && page * PAGE_BYTES < end; page++)
        mark(page, true);
}

/* Returns the physical address of a page that is now the caller's, contents unknown, or 0 if there is none. */
uint32_t page_allocate(void)
{
    for (uint32_t page = first_free_hint; page < PAGES; page++) {
        if (!(in_use[page / 32] & 1u << page % 32)) {
            mark(page, true);
            first_free_hint = page + 1;
            return page * PAGE_BYTES;
        }
    }
    return 0;
}

/* Give a page back. */
void page_free(uint32_t physical)
{
    uint32_t page = physical / PAGE_BYTES;
    mark(page, false);
    if (page < first_free_hint)
        first_free_hint = page;
}

uint32_t pages_free(void)
{
    uint32_t count = 0;
    for (uint32_t page = 0; page < PAGES; page++)
        count += !(in_use[page / 32] & 1u << page % 32);
    return count;
}

static uint32_t page_allocate_or_panic(void)
{
    uint32_t physical = page_allocate();
    if (physical == 0)
        panic("out of memory");
    return physical;
}

/* Returns the physical address of a new page directory: empty user half, the kernel's half shared by all. */
uint32_t directory_create(void)
{
    uint32_t directory = page_allocate_or_panic();
    uint32_t *entries = direct(directory);
    memset(entries, 0, KERNEL_ENTRY * sizeof entries[0]);
    memcpy(entries + KERNEL_ENTRY, kernel_directory + KERNEL_ENTRY, (ENTRIES - KERNEL_ENTRY) * sizeof entries[0]);
    return directory;
}

/* Let `linear` be `physical` in the address space of `directory`, with PAGE_ bits `flags`; makes a page table if there
   is none yet. */
void page_map(uint32_t directory, uint32_t linear, uint32_t physical, uint32_t flags)
{
    uint32_t *directory_entry = (uint32_t *)direct(directory) + (linear >> 22);
    if (!(*directory_entry & PAGE_PRESENT)) {
        uint32_t table = page_allocate_or_panic();
        memset(direct(table), 0, PAGE_BYTES);
        *directory_entry = table | PAGE_PRESENT | PAGE_WRITE | PAGE_USER;
    }
    uint32_t *table = direct(*directory_entry & -PAGE_BYTES);
    table[linear >> 12 & (ENTRIES - 1)] = physical | flags;
    if (read_cr3() == directory)
        asm volatile("invlpg (%0)" : : "r"(linear) : "memory");
}

/* Free an address space that is in use nowhere: the directory, its tables for the user half, and their writable
   pages. Read-only pages belong to the kernel's image, and so does whatever lies below it (the screen). */
void directory_destroy(uint32_t directory)
{
    uint32_t *entries = direct(directory);
    for (uint32_t i = 0; i < KERNEL_ENTRY; i++) {
        if (!(entries[i] & PAGE_PRESENT))
            continue;
        uint32_t *table = direct(entries[i] & -PAGE_BYTES);
        for (uint32_t j = 0; j < ENTRIES; j++) {
            uint32_t physical = table[j] & -PAGE_BYTES;
            if ((table[j] & PAGE_WRITE) && physical >= (uint32_t)kernel_end - KERNEL_BASE)
                page_free(physical);
        }
        page_free(entries[i] & -PAGE_BYTES);
    }
    page_free(directory);
}
