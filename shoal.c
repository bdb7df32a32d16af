/* The front door: finds the subcommand. */
int main(void) {
    return 2;
}
