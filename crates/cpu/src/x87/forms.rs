//! Which encoding an instruction has: escape byte and ModRM.

use iced_x86::Code;

macro_rules! by_code {
    ($code:expr; $($escape:literal { $($name:ident $field:literal),* $(,)? })*) => {
        match $code {
            $($(Code::$name => Some(($escape, $field)),)*)*
            _ => None,
        }
    };
}

/// Escape byte and ModRM of a register form that the host executes; add ST(i)'s number to ModRM.
pub(super) fn register_form(code: Code) -> Option<(u8, u8)> {
    by_code! { code;
        0xd8 {
            Fadd_st0_sti 0xc0, Fmul_st0_sti 0xc8, Fcom_st0_sti 0xd0, Fcomp_st0_sti 0xd8,
            Fsub_st0_sti 0xe0, Fsubr_st0_sti 0xe8, Fdiv_st0_sti 0xf0, Fdivr_st0_sti 0xf8
        }
        0xd9 {
            Fld_sti 0xc0, Fxch_st0_sti 0xc8, Fnop 0xd0, Fstpnce_sti 0xd8, Fchs 0xe0, Fabs 0xe1,
            Ftst 0xe4, Fxam 0xe5, Fld1 0xe8, Fldl2t 0xe9, Fldl2e 0xea, Fldpi 0xeb, Fldlg2 0xec,
            Fldln2 0xed, Fldz 0xee, F2xm1 0xf0, Fyl2x 0xf1, Fptan 0xf2, Fpatan 0xf3, Fxtract 0xf4,
            Fprem1 0xf5, Fdecstp 0xf6, Fincstp 0xf7, Fprem 0xf8, Fyl2xp1 0xf9, Fsqrt 0xfa, Fsincos
            0xfb, Frndint 0xfc, Fscale 0xfd, Fsin 0xfe, Fcos 0xff
        }
        0xda {
            Fcmovb_st0_sti 0xc0, Fcmove_st0_sti 0xc8, Fcmovbe_st0_sti 0xd0, Fcmovu_st0_sti 0xd8,
            Fucompp 0xe9
        }
        0xdb {
            Fcmovnb_st0_sti 0xc0, Fcmovne_st0_sti 0xc8, Fcmovnbe_st0_sti 0xd0, Fcmovnu_st0_sti
            0xd8, Fucomi_st0_sti 0xe8, Fcomi_st0_sti 0xf0
        }
        0xdc {
            Fadd_sti_st0 0xc0, Fmul_sti_st0 0xc8, Fcom_st0_sti_DCD0 0xd0, Fcomp_st0_sti_DCD8 0xd8,
            Fsubr_sti_st0 0xe0, Fsub_sti_st0 0xe8, Fdivr_sti_st0 0xf0, Fdiv_sti_st0 0xf8
        }
        0xdd {
            Ffree_sti 0xc0, Fxch_st0_sti_DDC8 0xc8, Fst_sti 0xd0, Fstp_sti 0xd8, Fucom_st0_sti
            0xe0, Fucomp_st0_sti 0xe8
        }
        0xde {
            Faddp_sti_st0 0xc0, Fmulp_sti_st0 0xc8, Fcomp_st0_sti_DED0 0xd0, Fcompp 0xd9,
            Fsubrp_sti_st0 0xe0, Fsubp_sti_st0 0xe8, Fdivrp_sti_st0 0xf0, Fdivp_sti_st0 0xf8
        }
        0xdf {
            Ffreep_sti 0xc0, Fxch_st0_sti_DFC8 0xc8, Fstp_sti_DFD0 0xd0, Fstp_sti_DFD8 0xd8,
            Fucomip_st0_sti 0xe8, Fcomip_st0_sti 0xf0
        }
    }
}

/// Escape byte and ModRM's reg field of a memory form that the host executes.
pub(super) fn memory_form(code: Code) -> Option<(u8, u8)> {
    by_code! { code;
        0xd8 {
            Fadd_m32fp 0, Fmul_m32fp 1, Fcom_m32fp 2, Fcomp_m32fp 3, Fsub_m32fp 4, Fsubr_m32fp 5,
            Fdiv_m32fp 6, Fdivr_m32fp 7
        }
        0xd9 {
            Fld_m32fp 0, Fst_m32fp 2, Fstp_m32fp 3
        }
        0xda {
            Fiadd_m32int 0, Fimul_m32int 1, Ficom_m32int 2, Ficomp_m32int 3, Fisub_m32int 4,
            Fisubr_m32int 5, Fidiv_m32int 6, Fidivr_m32int 7
        }
        0xdb {
            Fild_m32int 0, Fisttp_m32int 1, Fist_m32int 2, Fistp_m32int 3, Fld_m80fp 5, Fstp_m80fp
            7
        }
        0xdc {
            Fadd_m64fp 0, Fmul_m64fp 1, Fcom_m64fp 2, Fcomp_m64fp 3, Fsub_m64fp 4, Fsubr_m64fp 5,
            Fdiv_m64fp 6, Fdivr_m64fp 7
        }
        0xdd {
            Fld_m64fp 0, Fisttp_m64int 1, Fst_m64fp 2, Fstp_m64fp 3
        }
        0xde {
            Fiadd_m16int 0, Fimul_m16int 1, Ficom_m16int 2, Ficomp_m16int 3, Fisub_m16int 4,
            Fisubr_m16int 5, Fidiv_m16int 6, Fidivr_m16int 7
        }
        0xdf {
            Fild_m16int 0, Fisttp_m16int 1, Fist_m16int 2, Fistp_m16int 3, Fbld_m80bcd 4,
            Fild_m64int 5, Fbstp_m80bcd 6, Fistp_m64int 7
        }
    }
}

/// Bytes of a memory form's operand.
pub(super) const fn operand_size(escape: u8, reg: u8) -> usize {
    match (escape, reg) {
        (0xdb, 5 | 7) | (0xdf, 4 | 6) => 10,
        (0xdc, _) | (0xdd, _) | (0xdf, 5 | 7) => 8,
        (0xde | 0xdf, _) => 2,
        _ => 4,
    }
}

/// Whether a memory form stores its operand: FST, FSTP, FIST, FISTP, FISTTP, FBSTP.
pub(super) const fn stores(escape: u8, reg: u8) -> bool {
    matches!(
        (escape, reg),
        (0xd9, 2 | 3) | (0xdb, 1 | 2 | 3 | 7) | (0xdd, 1..=3) | (0xdf, 1 | 2 | 3 | 6 | 7)
    )
}
