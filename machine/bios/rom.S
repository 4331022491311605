# The BIOS ROM, F0000h to FFFFFh: entry points at the addresses that PC software has always found them, and almost no code.
#
# A service saves the registers in a frame on the caller's stack and writes the frame's address, SS in the high half and
# SP in the low, to the firmware port. The firmware (machine/bios) does the work on the frame, in memory only; then the
# registers are loaded from it and IRET ends the call. If it sets the frame's status, the ROM waits for an interrupt and
# asks again: that is how a service waits. With bit 15 of the service number set, too, the ROM asks again at once: so
# long work is done in pieces, and interrupts and debuggers come in between.
#
# Frame, offsets from SP at the OUT:   0 EDI  4 ESI  8 EBP  12 ESP  16 EBX  20 EDX  24 ECX  28 EAX
#                                     32 ES  34 DS  36 status  38 service  40 IP  42 CS  44 FLAGS

        .code16
        .set    FIRMWARE_PORT, 0x07F0
        .set    SERVICE_POST, 0xFE
        .set    BOOT_STACK, 0x7000

        # What service 09h (keyboard interrupt) leaves in AL for the ROM to do.
        .set    KEY_BREAK, 1
        .set    KEY_PRINT_SCREEN, 2
        .set    KEY_REBOOT, 3
        .set    KEY_SYSREQ_DOWN, 4
        .set    KEY_SYSREQ_UP, 5

        .macro  AT offset
        .org    \offset, 0
        .endm

        # Call the firmware from within the ROM, with a frame such as an INT makes.
        .macro  FIRMWARE service
        pushfw
        pushw   %cs
        pushw   $1f
        pushw   $\service
        jmp     call_firmware
1:
        .endm

        .macro  SERVICE vector
service_\vector:
        pushw   $0x\vector
        jmp     call_firmware
        .endm

        .text
rom:
        .asciz  "trapgate BIOS"

        # Descriptors are marked accessed already: the CPU could not write that into ROM.
        AT 0x0020
flat_gdt:
        .quad   0
        .quad   0x00CF9B000000FFFF              # 08h code, 32 bits
        .quad   0x00CF93000000FFFF              # 10h data
        .quad   0x00009B000000FFFF              # 18h code, 16 bits, base 0
        .quad   0x000093000000FFFF              # 20h data, 64 KiB
        AT 0x0048
linux_gdt:
        .quad   0
        .quad   0
        .quad   0x00CF9B000000FFFF              # 10h
        .quad   0x00CF93000000FFFF              # 18h

real_mode_idtr:
        .word   0x3FF
        .long   0

        AT 0x0100
call_firmware:
        pushw   $0
        pushw   %ds
        pushw   %es
        pushal
ask:
        movw    %ss, %ax
        shll    $16, %eax
        movw    %sp, %ax
        movw    $FIRMWARE_PORT, %dx
        outl    %eax, %dx
        movw    %sp, %bp
        cmpw    $0, 36(%bp)
        jne     wait
        popal
        popw    %es
        popw    %ds
        addw    $4, %sp
        iretw
wait:
        testb   $0x80, 39(%bp)
        jnz     again
        sti
        hlt
        cli
        jmp     ask
again:
        sti
        nop
        cli
        jmp     ask

        SERVICE 10
        SERVICE 11
        SERVICE 12
        SERVICE 13
        SERVICE 14
        SERVICE 15
        SERVICE 16
        SERVICE 17
        SERVICE 1a
        SERVICE 40

post:
        cli
        cld
        movl    %cr0, %eax
        andl    $0x9FFFFFFF, %eax               # caches on, as every BIOS leaves them
        movl    %eax, %cr0
        lidtl   %cs:real_mode_idtr
        xorl    %eax, %eax
        movw    %ax, %ss
        movl    $BOOT_STACK, %esp
        movw    %ax, %ds
        movw    %ax, %es
        FIRMWARE SERVICE_POST
        int     $0x19

# INT 19h: boot. The firmware makes the frame return to the boot sector; if it cannot, the call comes back here.
boot:
        cli
        xorl    %eax, %eax
        movw    %ax, %ss
        movl    $BOOT_STACK, %esp
        FIRMWARE 0x19
        int     $0x18

# INT 18h: nothing to boot from.
no_boot:
        FIRMWARE 0x18
1:      sti
        hlt
        jmp     1b

# IRQ 0: 18.2 times a second.
timer_interrupt:
        pushl   %eax
        pushw   %dx
        pushw   %ds
        xorw    %ax, %ax
        movw    %ax, %ds
        movl    0x46C, %eax
        incl    %eax
        cmpl    $0x1800B0, %eax
        jb      1f
        xorl    %eax, %eax
        movb    $1, 0x470
1:      movl    %eax, 0x46C
        int     $0x1C
        movb    $0x20, %al
        outb    %al, $0x20
        popw    %ds
        popw    %dx
        popl    %eax
        iretw

# IRQ 1: what the key means is decided in the firmware, after INT 15h AH=4Fh may have changed or taken it.
keyboard_interrupt:
        pushw   %ax
        inb     $0x60, %al
        movb    $0x4F, %ah
        stc
        int     $0x15
        jnc     2f
        FIRMWARE 0x09
        jmp     3f
2:      xorb    %al, %al
3:      pushw   %ax
        movb    $0x20, %al
        outb    %al, $0x20
        popw    %ax
        cmpb    $KEY_BREAK, %al
        jne     4f
        int     $0x1B
        jmp     9f
4:      cmpb    $KEY_PRINT_SCREEN, %al
        jne     5f
        int     $0x05
        jmp     9f
5:      cmpb    $KEY_REBOOT, %al
        je      reset
        cmpb    $KEY_SYSREQ_DOWN, %al
        jb      9f
        subb    $KEY_SYSREQ_DOWN, %al
        movb    $0x85, %ah
        int     $0x15
9:      popw    %ax
        iretw

# IRQ 8: the RTC's periodic interrupt (waits) and alarm.
rtc_interrupt:
        pushw   %ax
        FIRMWARE 0x70
        testb   %al, %al
        jz      1f
        int     $0x4A
1:      popw    %ax
        jmp     end_of_slave

# IRQ 6: a diskette controller has finished.
diskette_interrupt:
        pushw   %ax
        pushw   %ds
        xorw    %ax, %ax
        movw    %ax, %ds
        orb     $0x80, 0x43E
        popw    %ds
        popw    %ax
        jmp     end_of_master

# IRQ 9 is what IRQ 2 was before there were two controllers.
redirected_interrupt:
        pushw   %ax
        movb    $0x20, %al
        outb    %al, $0xA0
        popw    %ax
        int     $0x0A
        iretw

# IRQ 12: no mouse driver, but its byte must be taken.
mouse_interrupt:
        pushw   %ax
        inb     $0x60, %al
        popw    %ax
        jmp     end_of_slave

# IRQ 13: an FPU error, which old software expects as an NMI.
fpu_interrupt:
        pushw   %ax
        xorb    %al, %al
        outb    %al, $0xF0
        movb    $0x20, %al
        outb    %al, $0xA0
        outb    %al, $0x20
        popw    %ax
        int     $0x02
        iretw

# IRQ 14: a hard disk has finished.
disk_interrupt:
        pushw   %ax
        pushw   %ds
        xorw    %ax, %ax
        movw    %ax, %ds
        movb    $0xFF, 0x48E
        popw    %ds
        popw    %ax

end_of_slave:
        pushw   %ax
        movb    $0x20, %al
        outb    %al, $0xA0
        popw    %ax
end_of_master:
        pushw   %ax
        movb    $0x20, %al
        outb    %al, $0x20
        popw    %ax
        iretw

# Where the vectors point, for the firmware, which fills the vector table: vector, offset; ended by FFFFh.
        AT 0x0400
vectors:
        .word   0x02, nmi
        .word   0x05, print_screen
        .word   0x08, timer
        .word   0x09, keyboard
        .word   0x0A, end_of_master
        .word   0x0B, end_of_master
        .word   0x0C, end_of_master
        .word   0x0D, end_of_master
        .word   0x0E, diskette
        .word   0x0F, end_of_master
        .word   0x10, video
        .word   0x11, equipment
        .word   0x12, memory_size
        .word   0x13, disk
        .word   0x14, serial
        .word   0x15, system
        .word   0x16, keyboard_service
        .word   0x17, printer
        .word   0x18, no_boot
        .word   0x19, bootstrap
        .word   0x1A, time_of_day
        .word   0x1D, video_parameters
        .word   0x1E, diskette_parameters
        .word   0x1F, upper_font
        .word   0x40, diskette_service
        .word   0x43, font_8x8
        .word   0x70, rtc_interrupt
        .word   0x71, redirected_interrupt
        .word   0x72, end_of_slave
        .word   0x73, end_of_slave
        .word   0x74, mouse_interrupt
        .word   0x75, fpu_interrupt
        .word   0x76, disk_interrupt
        .word   0x77, end_of_slave
        .word   0xFFFF

# Room for a font of 256 glyphs of 16 rows, all blank: the screen is text, nothing draws from it.
        AT 0x1000
font_8x16:
upper_font:

        AT 0xE05B
        jmp     post
        AT 0xE2C3
nmi:    iretw
        AT 0xE3FE
disk:   jmp     service_13
        AT 0xE6F2
bootstrap:
        jmp     boot

# INT 15h AH=C0h.
        AT 0xE6F5
configuration:
        .word   8                               # bytes that follow
        .byte   0xFC, 0x00, 0x01                # model, submodel, revision
        .byte   0x74                            # second PIC, RTC, INT 15h AH=4Fh, EBDA
        .byte   0x40                            # INT 16h AH=09h
        .byte   0, 0, 0

        AT 0xE729                               # divisors of 115200 Hz for 110 to 9600 baud
        .word   1047, 768, 384, 192, 96, 48, 24, 12
        AT 0xE739
serial: jmp     service_14
        AT 0xE82E
keyboard_service:
        jmp     service_16
        AT 0xE987
keyboard:
        jmp     keyboard_interrupt
        AT 0xEC59
diskette_service:
        jmp     service_40
        AT 0xEF57
diskette:
        jmp     diskette_interrupt

# INT 1Eh: a 1.44 MB drive.
        AT 0xEFC7
diskette_parameters:
        .byte   0xAF, 0x02, 0x25, 0x02, 18, 0x1B, 0xFF, 0x6C, 0xF6, 0x0F, 0x08

        AT 0xEFD2
printer:
        jmp     service_17
        AT 0xF065
video:  jmp     service_10

# INT 1Dh: 6845 registers for 40 and 80 columns, graphics and monochrome; page sizes, columns, mode bytes.
        AT 0xF0A4
video_parameters:
        .byte   0x38, 0x28, 0x2D, 0x0A, 0x1F, 0x06, 0x19, 0x1C, 0x02, 0x07, 0x06, 0x07, 0, 0, 0, 0
        .byte   0x71, 0x50, 0x5A, 0x0A, 0x1F, 0x06, 0x19, 0x1C, 0x02, 0x07, 0x06, 0x07, 0, 0, 0, 0
        .byte   0x38, 0x28, 0x2D, 0x0A, 0x7F, 0x06, 0x64, 0x70, 0x02, 0x01, 0x06, 0x07, 0, 0, 0, 0
        .byte   0x61, 0x50, 0x52, 0x0F, 0x19, 0x06, 0x19, 0x19, 0x02, 0x0D, 0x0B, 0x0C, 0, 0, 0, 0
        .word   0x0800, 0x1000, 0x4000, 0x4000
        .byte   40, 40, 80, 80, 40, 40, 80, 80
        .byte   0x2C, 0x28, 0x2D, 0x29, 0x2A, 0x2E, 0x1E, 0x29

        AT 0xF841
memory_size:
        jmp     service_12
        AT 0xF84D
equipment:
        jmp     service_11
        AT 0xF859
system: jmp     service_15

        AT 0xFA6E
font_8x8:

        AT 0xFE6E
time_of_day:
        jmp     service_1a
        AT 0xFEA5
timer:  jmp     timer_interrupt
        AT 0xFF53
        iretw
        AT 0xFF54
print_screen:
        iretw

        AT 0xFFF0
reset:  ljmpw   $0xF000, $0xE05B
        AT 0xFFF5
        .ascii  "01/01/26"
        AT 0xFFFE
        .byte   0xFC, 0
