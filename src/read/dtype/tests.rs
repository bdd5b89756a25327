use half::bf16;
use proptest::prelude::*;

use super::*;

const FLOATS: [Dtype; 4] = [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::Bf16];

fn encoded_f32(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut out = vec![0; values.len() * dtype.float_bytes().expect("a float")];
    encode_f32(dtype, values, &mut out).expect("the right length");
    out
}

fn encoded_f64(dtype: Dtype, values: &[f64]) -> Vec<u8> {
    let mut out = vec![0; values.len() * dtype.float_bytes().expect("a float")];
    encode_f64(dtype, values, &mut out).expect("the right length");
    out
}

fn decoded_f64(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    let mut out = vec![0.0; bytes.len() / dtype.float_bytes().expect("a float")];
    decode_f64(dtype, bytes, &mut out).expect("the right length");
    out
}

fn bf16_of(value: f64) -> u16 {
    let bytes = encoded_f64(Dtype::Bf16, &[value]);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

fn f16_of(value: f64) -> u16 {
    let bytes = encoded_f64(Dtype::F16, &[value]);
    u16::from_le_bytes([bytes[0], bytes[1]])
}

#[test]
fn names_and_sizes_are_those_of_the_safetensors_crate() {
    for dtype in Dtype::ALL {
        let reference: safetensors::Dtype =
            serde_json::from_value(serde_json::Value::String(dtype.name().to_owned())).expect("known there");
        assert_eq!(reference.bitsize() as u64, dtype.bits(), "{dtype}");
        assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        assert_eq!(dtype.is_float(), FLOATS.contains(&dtype));
        assert!(!(dtype.is_float() && dtype.is_copied()));
        assert_eq!(serde_json::to_value(dtype).expect("a string"), dtype.name());
    }
    assert_eq!(Dtype::from_name("bf16"), None);
}

#[test]
fn every_bf16_and_f16_decodes_as_half_does_and_comes_back() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    let bytes: Vec<u8> = all.iter().flat_map(|bits| bits.to_le_bytes()).collect();
    let mut wide = vec![0f32; all.len()];
    for dtype in [Dtype::Bf16, Dtype::F16] {
        decode_f32(dtype, &bytes, &mut wide).expect("the right length");
        let wide64 = decoded_f64(dtype, &bytes);
        for ((bits, value), value64) in all.iter().zip(&wide).zip(&wide64) {
            let expected = match dtype {
                Dtype::Bf16 => bf16::from_bits(*bits).to_f32(),
                _ => f16::from_bits(*bits).to_f32(),
            };
            assert!(
                value.to_bits() == expected.to_bits() || (value.is_nan() && expected.is_nan()),
                "{bits:#06x}"
            );
            assert!(
                *value64 == f64::from(expected) || (value64.is_nan() && expected.is_nan()),
                "{bits:#06x}"
            );
        }
        for back in [encoded_f32(dtype, &wide), encoded_f64(dtype, &wide64)] {
            for ((bits, value), stored) in all.iter().zip(&wide).zip(back.as_chunks::<2>().0) {
                let stored = u16::from_le_bytes(*stored);
                if value.is_nan() {
                    let mut again = [0f32];
                    decode_f32(dtype, &stored.to_le_bytes(), &mut again).expect("one element");
                    assert!(again[0].is_nan(), "{bits:#06x}");
                } else {
                    assert_eq!(stored, *bits);
                }
            }
        }
    }
}

#[test]
fn f64_is_rounded_once() {
    // 1 + 2⁻⁸ is halfway between the bf16 values 1 and 1 + 2⁻⁷; ties go to even, which is 1.
    let tie = 1.0 + 2f64.powi(-8);
    assert_eq!(bf16_of(tie), bf16::ONE.to_bits());
    // A hair above the tie rounds up. Through f32 the hair would be lost first, and the tie would go to even.
    let above = tie + 2f64.powi(-40);
    assert_eq!(above as f32, tie as f32);
    assert_eq!(bf16_of(above), bf16::ONE.to_bits() + 1);
    assert_eq!(bf16_of(-above), bf16::NEG_ONE.to_bits() + 1);
    // A hair below an odd tie rounds down: 1 + 3·2⁻⁸ lies between 1 + 2⁻⁷ (odd) and 1 + 2⁻⁶ (even).
    let odd_tie = 1.0 + 3.0 * 2f64.powi(-8);
    assert_eq!(bf16_of(odd_tie), bf16::ONE.to_bits() + 2);
    assert_eq!(bf16_of(odd_tie - 2f64.powi(-40)), bf16::ONE.to_bits() + 1);
    // The same for f16, whose last bit of 1 is 2⁻¹⁰.
    let tie = 1.0 + 2f64.powi(-11);
    assert_eq!(f16_of(tie), f16::ONE.to_bits());
    assert_eq!(f16_of(tie + 2f64.powi(-40)), f16::ONE.to_bits() + 1);
}

#[test]
fn extremes_keep_their_meaning() {
    for dtype in FLOATS {
        let values = [f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -0.0];
        let back = decoded_f64(dtype, &encoded_f64(dtype, &values));
        assert!(back[0].is_nan() && back[1].is_nan(), "{dtype}");
        assert_eq!(back[2..4], values[2..4], "{dtype}");
        assert!(
            back[4].is_sign_positive() && back[5].is_sign_negative() && back[4..] == [0.0, 0.0],
            "{dtype}"
        );
        if dtype != Dtype::F64 {
            let back = decoded_f64(dtype, &encoded_f64(dtype, &[1e300, -1e300, 1e-300, -1e-300]));
            assert_eq!(back[..2], [f64::INFINITY, f64::NEG_INFINITY], "{dtype}");
            assert!(back[2..] == [0.0, 0.0] && back[3].is_sign_negative(), "{dtype}");
        }
        let back = decoded_f64(
            dtype,
            &encoded_f32(dtype, &[f32::from_bits(0x7f80_0001), f32::from_bits(0xff80_0001)]),
        );
        assert!(back.iter().all(|v| v.is_nan()), "{dtype}");
    }
    // The largest finite bf16, and what lies halfway to the next power of two.
    let largest = f64::from(bf16::MAX.to_f32());
    let half_step = 2f64.powi(127 - 8);
    assert_eq!(bf16_of(largest), bf16::MAX.to_bits());
    assert_eq!(bf16_of(largest + half_step * (1.0 - 1e-9)), bf16::MAX.to_bits());
    assert_eq!(bf16_of(largest + half_step), bf16::INFINITY.to_bits());
    // The smallest denormal of bf16, 2⁻¹³³, and half of it, a tie that goes to zero.
    assert_eq!(bf16_of(2f64.powi(-133)), 1);
    assert_eq!(bf16_of(2f64.powi(-134)), 0);
    assert_eq!(bf16_of(2f64.powi(-134) * (1.0 + 1e-12)), 1);
    // The same for f16, 2⁻²⁴.
    assert_eq!(
        (f16_of(2f64.powi(-24)), f16_of(2f64.powi(-25)), f16_of(2f64.powi(-25) * (1.0 + 1e-12))),
        (1, 0, 1)
    );
}

#[test]
fn bytes_may_lie_anywhere() {
    let values: Vec<f32> = (0..3000).map(|i| i as f32 * 0.25 - 100.0).collect();
    for dtype in FLOATS {
        let stored = encoded_f32(dtype, &values);
        for shift in 0..8 {
            let mut moved = vec![0xaa; shift];
            moved.extend_from_slice(&stored);
            let mut back = vec![0f32; values.len()];
            decode_f32(dtype, &moved[shift..], &mut back).expect("the right length");
            assert_eq!(decoded_f64(dtype, &moved[shift..]), decoded_f64(dtype, &stored));
            let mut again = vec![0; shift + stored.len()];
            encode_f32(dtype, &back, &mut again[shift..]).expect("the right length");
            assert_eq!(again[shift..], stored[..], "{dtype}");
        }
    }
}

#[test]
fn lengths_and_dtypes_are_checked() {
    assert!(matches!(decode_f32(Dtype::F32, &[0; 7], &mut [0.0]), Err(ReadError::ConversionLength { .. })));
    assert!(matches!(
        encode_f64(Dtype::F16, &[0.0; 2], &mut [0; 3]),
        Err(ReadError::ConversionLength { .. })
    ));
    assert!(matches!(decode_f64(Dtype::F8E4M3, &[0], &mut [0.0]), Err(ReadError::NotFloat { .. })));
    assert!(matches!(encode_f32(Dtype::I64, &[0.0], &mut [0; 8]), Err(ReadError::NotFloat { .. })));
}

#[test]
fn integers_keep_their_sign_and_width() {
    for (dtype, element, expected) in [
        (Dtype::I8, &[0xff][..], Some(-1)),
        (Dtype::U8, &[0xff], Some(255)),
        (Dtype::Bool, &[1], Some(1)),
        (Dtype::I16, &[0, 0x80], Some(-32768)),
        (Dtype::U32, &[0, 0, 0, 0x80], Some(1 << 31)),
        (Dtype::I64, &i64::MIN.to_le_bytes(), Some(i128::from(i64::MIN))),
        (Dtype::U64, &[0xff; 8], Some(i128::from(u64::MAX))),
        (Dtype::I32, &[0; 3], None),
        (Dtype::F32, &[0; 4], None),
    ] {
        assert_eq!(decode_integer(dtype, element), expected);
    }
}

#[test]
fn finds_the_first_value_that_is_not_finite() {
    for at in [0, 1, 1023, 1024, 4999] {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut values = vec![f64::MAX; 5000];
            values[at] = bad;
            values[4999] = f64::NAN;
            assert_eq!(first_nonfinite_f64(&values), Some(at));
            let mut values = vec![f32::MIN; 5000];
            values[at] = bad as f32;
            values[4999] = f32::NAN;
            assert_eq!(first_nonfinite_f32(&values), Some(at));
        }
    }
    assert_eq!(first_nonfinite_f32(&[f32::MAX; 5000]), None);
    assert_eq!(first_nonfinite_f64(&[]), None);
}

proptest! {
    /// f32 to bf16 and f16 as `half` does it, bit for bit.
    #[test]
    fn encodes_f32_as_half_does(bits in proptest::collection::vec(any::<u32>(), 1..50)) {
        let values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        let stored = encoded_f32(Dtype::Bf16, &values);
        let expected: Vec<u8> = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        prop_assert_eq!(stored, expected);
        for (value, stored) in values.iter().zip(encoded_f32(Dtype::F16, &values).as_chunks::<2>().0) {
            let (got, expected) = (f16::from_le_bytes(*stored), f16::from_f32(*value));
            prop_assert!(got.to_bits() == expected.to_bits() || (got.is_nan() && expected.is_nan()));
        }
    }

    /// f64 to a half type: no stored neighbour is nearer, and of two that are equally near, the even one is taken.
    #[test]
    fn encodes_f64_as_the_nearest(mantissa in any::<u64>(), exponent in -140i32..17, coarse in any::<bool>()) {
        // Coarse values hit ties often.
        let mantissa = if coarse { mantissa & 0xfff8_0000_0000_0000 } else { mantissa };
        let value = (mantissa as f64 / 2f64.powi(64) + 1.0) * 2f64.powi(exponent);
        for (dtype, largest) in [(Dtype::Bf16, bf16::MAX.to_bits()), (Dtype::F16, f16::MAX.to_bits())] {
            let bytes = encoded_f64(dtype, &[value]);
            let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
            if bits > largest {
                continue;
            }
            let distance = |bits: u16| (decoded_f64(dtype, &bits.to_le_bytes())[0] - value).abs();
            for neighbour in [bits.checked_sub(1), (bits < largest).then_some(bits + 1)].into_iter().flatten() {
                prop_assert!(distance(bits) < distance(neighbour) || (distance(bits) == distance(neighbour) && bits.is_multiple_of(2)));
            }
        }
    }
}
