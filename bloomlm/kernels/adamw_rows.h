// AdamW of weights in float32 for one level of instructions: this text is compiled once for each, inside a namespace of its own,
// after its vectors.

template <class G>
void adamw(const AdamW& c, const Updated<G>& u, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  const Floats minus_one = all(-1.0f), minus_step = all(-c.step_size);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Floats gradient = load(u.gradient + i), old = load(u.mean + i);
    const Floats mean = add_product(old, all(c.new_mean), add_product(gradient, old, minus_one));
    const Floats added = multiply(all(c.new_square), multiply(gradient, gradient));
    const Floats squares = add_product(added, all(c.beta2), load(u.squares + i));
    const Floats below = add_product(all(c.epsilon), root(squares), all(c.inverse_root));
    const Floats master = add_product(multiply(all(c.kept), load(u.master + i)), minus_step, divide(mean, below));
    store(u.mean + i, mean);
    store(u.squares + i, squares);
    store(u.master + i, master);
    if (u.weight) store_rounded(u.weight + i, master);
  }
  scalar::adamw(c, u.at(whole), count - whole);
}

template <class G>
double sum_of_squares(const G* numbers, int64_t count) {
  const int64_t whole = count / (4 * kLanes) * (4 * kLanes);
  Floats sums[4] = {};
  for (int64_t i = 0; i < whole; i += 4 * kLanes)
    for (int64_t j = 0; j < 4; ++j) {
      const Floats v = load(numbers + i + j * kLanes);
      sums[j] = add_product(sums[j], v, v);
    }
  return total(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) + scalar::sum_of_squares(numbers + whole, count - whole);
}
