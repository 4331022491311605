/* Memory: page frames with their counts of users, address spaces, and what makes pages come and go: copy on write, zeros
   on the first touch, and system calls. */
#include "kernel.h"

#define ENTRIES 1024
#define FRAMES (DIRECT_BYTES / PAGE_BYTES)
#define FLAGS 0xFFF
#define PAGE_WORDS (PAGE_BYTES / 4)
#define USER_ENTRY (USER_TEXT >> 22)
#define ERROR_PRESENT 0x1
#define ERROR_WRITE 0x2

/* fork.ld: the user's program as the loader left it, and the end of the kernel. */
extern char user_physical[], user_text[], user_data[], user_end[], kernel_end[];

uint32_t kernel_directory[ENTRIES] __attribute__((aligned(PAGE_BYTES)));
static uint32_t direct_tables[FRAMES] __attribute__((aligned(PAGE_BYTES)));
static uint16_t users[FRAMES];
static uint16_t free_frames[FRAMES]; /* a stack */
static uint32_t free_count;

/* Map physical memory to itself for ring 0, hand out what lies behind the kernel, and turn paging on. */
void memory_init(uint32_t ram_bytes)
{
    uint32_t end = ram_bytes < DIRECT_BYTES ? ram_bytes / PAGE_BYTES : FRAMES;
    for (uint32_t frame = 0; frame < (uint32_t)kernel_end / PAGE_BYTES; frame++)
        users[frame] = 1; /* the kernel's own, never handed out */
    for (uint32_t frame = end; frame-- > (uint32_t)kernel_end / PAGE_BYTES;)
        free_frames[free_count++] = frame;
    for (uint32_t frame = 0; frame < FRAMES; frame++)
        direct_tables[frame] = frame * PAGE_BYTES | PAGE_PRESENT | PAGE_WRITE;
    for (uint32_t i = 0; i < FRAMES / ENTRIES; i++)
        kernel_directory[i] = (uint32_t)(direct_tables + i * ENTRIES) | PAGE_PRESENT | PAGE_WRITE;
    load_cr3((uint32_t)kernel_directory);
    asm volatile("movl %%cr0, %%eax\n\t"
                 "orl %0, %%eax\n\t"
                 "movl %%eax, %%cr0"
                 :
                 : "i"(CR0_PG | CR0_WP)
                 : "eax", "memory");
}

uint32_t frames_free(void)
{
    return free_count;
}

/* Returns the physical address of a page with one user, contents unknown. */
uint32_t frame_allocate(void)
{
    if (free_count == 0)
        fail("out of memory", 0);
    uint32_t frame = free_frames[--free_count];
    users[frame] = 1;
    return frame * PAGE_BYTES;
}

/* One user less; the last one gives it back. */
void frame_release(uint32_t physical)
{
    uint32_t frame = physical / PAGE_BYTES;
    if (users[frame] == 0)
        fail("a free page is released", physical);
    if (--users[frame] == 0)
        free_frames[free_count++] = frame;
}

static uint32_t frame_allocate_zeroed(void)
{
    uint32_t physical = frame_allocate();
    fill_words(physical, 0, PAGE_WORDS);
    return physical;
}

/* An address space with nothing in the user's part but an empty table. */
uint32_t space_create(void)
{
    uint32_t directory = frame_allocate_zeroed();
    uint32_t *entries = (uint32_t *)directory;
    for (uint32_t i = 0; i < FRAMES / ENTRIES; i++)
        entries[i] = kernel_directory[i];
    entries[USER_ENTRY] = frame_allocate_zeroed() | PAGE_PRESENT | PAGE_WRITE | PAGE_USER;
    return directory;
}

static uint32_t *user_table(uint32_t directory)
{
    return (uint32_t *)(((uint32_t *)directory)[USER_ENTRY] & ~FLAGS);
}

static uint32_t *user_entry(uint32_t linear)
{
    if (linear < USER_TEXT || linear >= USER_END)
        fail("no address of ring 3", linear);
    return user_table(process_directory()) + (linear >> 12) % ENTRIES;
}

/* Map the program: its text as it is, its data and the top of the stack as private pages. Returns the stack pointer, at
   `arguments`: a return address and two parameters. */
uint32_t space_load_program(uint32_t directory, uint32_t arguments[3])
{
    uint32_t *table = user_table(directory);
    uint32_t physical = (uint32_t)user_physical;
    for (uint32_t linear = (uint32_t)user_text; linear < (uint32_t)user_end; linear += PAGE_BYTES) {
        uint32_t entry = physical | PAGE_PRESENT | PAGE_USER;
        if (linear >= (uint32_t)user_data) {
            entry = frame_allocate() | PAGE_PRESENT | PAGE_WRITE | PAGE_USER;
            copy_words(entry & ~FLAGS, physical, PAGE_WORDS);
        } else {
            users[physical / PAGE_BYTES]++;
        }
        table[(linear >> 12) % ENTRIES] = entry;
        physical += PAGE_BYTES;
    }
    uint32_t stack = frame_allocate_zeroed();
    table[ENTRIES - 1] = stack | PAGE_PRESENT | PAGE_WRITE | PAGE_USER;
    copy_words(stack + PAGE_BYTES - 12, (uint32_t)arguments, 3);
    return USER_STACK_TOP - 12;
}

/* A second address space with the same pages. What either of them may write to, each is to copy first. The caller has to
   load CR3 if `directory` is in use. */
uint32_t space_copy(uint32_t directory)
{
    uint32_t copy = space_create();
    uint32_t *from = user_table(directory), *to = user_table(copy);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        uint32_t entry = from[i];
        if (!(entry & PAGE_PRESENT))
            continue;
        if (entry & PAGE_WRITE) {
            entry = (entry & ~PAGE_WRITE) | PAGE_SHARED;
            from[i] = entry;
        }
        to[i] = entry;
        users[entry / PAGE_BYTES]++;
    }
    return copy;
}

/* Give back an address space that is in use nowhere. */
void space_destroy(uint32_t directory)
{
    uint32_t *table = user_table(directory);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        if (table[i] & PAGE_PRESENT)
            frame_release(table[i] & ~FLAGS);
    }
    frame_release((uint32_t)table);
    frame_release(directory);
}

static void invalidate(uint32_t linear)
{
    asm volatile("invlpg (%0)" : : "r"(linear) : "memory");
}

/* A page of zeros for the current process. */
void space_map(uint32_t linear)
{
    uint32_t *entry = user_entry(linear);
    if (*entry & PAGE_PRESENT)
        fail("mapped twice", linear);
    *entry = frame_allocate_zeroed() | PAGE_PRESENT | PAGE_WRITE | PAGE_USER;
    counts.zeroed++;
}

/* Take a page away from the current process. */
void space_unmap(uint32_t linear)
{
    uint32_t *entry = user_entry(linear);
    if (!(*entry & PAGE_PRESENT))
        fail("not mapped", linear);
    uint32_t physical = *entry & ~FLAGS;
    *entry = 0;
    invalidate(linear);
    frame_release(physical);
}

/* Ring 3 touched what it may not: copy what it shares, or give it zeros. Anything else is a mistake. */
void page_fault(uint32_t linear, const struct frame *frame)
{
    counts.page_faults++;
    if (!(frame->cs & 3))
        fail("page fault in the kernel", linear);
    uint32_t *entry = user_entry(linear);
    if (!(frame->error & ERROR_PRESENT)) {
        if (linear < USER_HEAP)
            fail("page fault in ring 3", linear);
        space_map(linear);
        return;
    }
    if (!(frame->error & ERROR_WRITE) || !(*entry & PAGE_SHARED))
        fail("page fault in ring 3", linear);
    uint32_t physical = *entry & ~FLAGS;
    if (users[physical / PAGE_BYTES] == 1) {
        counts.reuses++;
    } else {
        uint32_t copy = frame_allocate();
        copy_words(copy, physical, PAGE_WORDS);
        frame_release(physical);
        physical = copy;
        counts.copies++;
    }
    *entry = physical | PAGE_PRESENT | PAGE_WRITE | PAGE_USER;
    invalidate(linear);
}
